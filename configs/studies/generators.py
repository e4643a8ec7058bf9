"""Does the generator of functions lose to its twin of one fixed size? Global and local functions against DiT and U-ViT.

    python -m launch.run --config configs/studies/generators.py --sweep generator,seed --root runs
    python -m benchmarks.study --experiment runs/generators

Digits at 8 px, 1,500 steps of 128 images, no pre-training. Arms see the same images in the same order and cost the same: 38 to
42 MFLOP an image and training step, by XLA's count (`--sweep generator` writes their sizes out).
"""

from configs import common


def get_config(arg: str = ""):
    """What the arms share."""
    config = common.base()
    config.data.update({"source": "digits", "image_size": 8, "channels": 1, "holdout_every": 4})
    config.model.update({"patch": 4, "width": 96, "heads": 4, "cutoff": "2", "weight_update": "scale", "unroll": True})
    config.objective = common.objective("ect", stages=6, log_mean=0.3, log_deviation=1.5)
    config.optimizers.generator = common.optimizer(
        "adam", 3e-3, warmup_steps=100, schedule="cosine", b2=0.99, grad_clip=1.0
    )
    config.update({"num_steps": 1500, "batch_size": 128, "ema_decays": (0.999,), "variational": False})
    config.checkpoint.update({"every": 1500, "keep": 1})
    config.log.update({"every": 50, "sample_every": 1500, "tensorboard": False})
    return common.finish(config, arg)


def _arm(**model) -> dict:
    return {f"model.{name}": value for name, value in model.items()}


def get_sweep():
    """`generator` and `seed`."""
    # Half the Nyquist rate, as in the demo.
    function = {"function": "5x64", "function_width": 64, "function_depth": 3, "bands": 8, "groups": 4}
    return {
        "generator": [
            _arm(extractor_depth=4, predictor_depth=2, **function),
            _arm(extractor_depth=6, predictor_depth=2, function="local64"),
            _arm(network="dit", depth=10),
            _arm(network="uvit", depth=8, width=88),
        ],
        "seed": [{"seed": seed} for seed in (0, 1, 2)],
    }
