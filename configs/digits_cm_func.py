"""Image functions of handwritten digits (scikit-learn, 8x8, 1,797 images): the demo.

    python -m fid_imagegen.train --config configs/digits_cm_func.py --workdir runs/digits

Arguments: `long` trains for half an hour; `runlocal` for seconds.
Expected on 2 cores: see docs/results.md, "Digits".
"""

from configs import common


def get_config(arg: str = ""):
    """`ect` on the clean-image blend, a predictor pre-trained by reconstruction."""
    config = common.base()
    config.data.update({"source": "digits", "image_size": 8, "channels": 1, "holdout_every": 4})
    # Four tokens of 4x4 pixels and four predicted columns a layer: what 2 cores can train in minutes.
    config.model.update({"patch": 4, "width": 96, "heads": 4, "extractor_depth": 4, "predictor_depth": 2})
    # Global functions: of digits enlarged 16 times nearly all lies between pixels. It must be smooth: ReLU adds harmonics to
    # its features, and jittered coordinates teach it pixel-shaped plateaus, so that half the Nyquist rate and clean coordinates
    # gave the better strokes to the eye.
    config.model.update({"function": "5x64", "function_width": 64, "function_depth": 3, "bands": 8, "groups": 4})
    config.model.cutoff = "2"
    config.model.update({"weight_update": "scale", "unroll": True})
    config.objective = common.objective("ect", stages=6, log_mean=0.3, log_deviation=1.5)
    config.optimizers.generator = common.optimizer(
        "adam", 3e-3, warmup_steps=100, schedule="cosine", b2=0.99, grad_clip=1.0
    )
    config.num_steps, config.batch_size = 2800, 128
    config.ema_decays = (0.999,)
    config.pretrain.update({"num_steps": 800, "batch_size": 128, "checkpoint_every": 200})
    config.pretrain.optimizers.generator = common.optimizer("adam", 5e-3, warmup_steps=50, schedule="cosine", b2=0.99)
    config.checkpoint.every = 500
    config.log.update({"every": 20, "sample_every": 500})
    return common.finish(config, arg, {"long": long})


def long(config):
    """Half an hour on 2 cores: what the recipe does when given time."""
    # Six stages as in the demo: eight ended worse than they began (docs/results.md), r too close to t for its batch.
    config.num_steps, config.batch_size = 11_000, 256
    config.optimizers.generator.learning_rate = 2e-3
    config.ema_decays = (0.9995,)
    config.pretrain.num_steps = 1500
    config.checkpoint.every = config.log.sample_every = 2500
    config.log.every = 100


def get_sweep():
    """Named sweeps: lists of overrides."""
    return {
        "lr": [{"optimizers.generator.learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)],
        "seed": [{"seed": seed} for seed in (0, 1, 2)],
        "objective": [{"preconditioning": name} for name in ("edm", "x0_blend")],
    }
