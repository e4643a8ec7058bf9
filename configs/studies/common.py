"""What the studies share: the images, their order, the budget, and no pre-training unless a study says so."""

from ml_collections import ConfigDict

from configs import common

SEEDS = [{"seed": seed} for seed in (0, 1, 2)]
# The demo's image function: half the Nyquist rate.
FUNCTION = {"function": "5x64", "function_width": 64, "function_depth": 3, "bands": 8, "groups": 4}


def digits():
    """1,500 steps of 128 digits at 8 px by `ect`, global functions."""
    config = common.base()
    config.data.update({"source": "digits", "image_size": 8, "channels": 1, "holdout_every": 4})
    config.model.update({"patch": 4, "width": 96, "heads": 4, "cutoff": "2", "weight_update": "scale", "unroll": True})
    config.model.update({"extractor_depth": 4, "predictor_depth": 2, **FUNCTION})
    config.objective = common.objective("ect", stages=6, log_mean=0.3, log_deviation=1.5)
    config.optimizers.generator = common.optimizer(
        "adam", 3e-3, warmup_steps=100, schedule="cosine", b2=0.99, grad_clip=1.0
    )
    config.update({"num_steps": 1500, "batch_size": 128, "ema_decays": (0.999,)})
    config.checkpoint.update({"every": 1500, "keep": 1})
    config.log.update({"every": 50, "sample_every": 1500, "tensorboard": False})
    return config


def faces():
    """600 steps of 128 LFW faces at 16 px, sixteen tokens; `python ../shared/data/unpack.py --out runs/data lfw` unpacks them."""
    config = digits()
    config.data.update({"source": "folder", "path": "runs/data/lfw", "image_size": 16, "channels": 3})
    # Half the Nyquist rate again; as deep as makes a global function cost what its rivals do at this size.
    config.model.update({"cutoff": "4", "extractor_depth": 7})
    config.objective.stages = 3  # six in as few steps end in grain
    config.num_steps = config.checkpoint.every = config.log.sample_every = 600
    return config


def cifar10():
    """The same of CIFAR-10, without its labels, at 16 px; `python ../shared/data/unpack.py --out runs/data --npz cifar10`."""
    config = faces()
    config.data.update({"source": "npz", "path": "runs/data/cifar10_train.npz", "holdout_every": 10})
    return config


SETS = {"digits": digits, "faces": faces, "cifar10": cifar10}


def base(arg: str) -> ConfigDict:
    """The set that is named among the variants in `arg`, digits where none is."""
    return SETS[next(filter(SETS.get, arg.split(",")), "digits")]()


def finish(config: ConfigDict, arg: str, variants: dict) -> ConfigDict:
    """`common.finish`, which lets the name of the set pass."""
    return common.finish(config, arg, dict.fromkeys(SETS, lambda config: None) | variants)


def arms(*names: str) -> list[dict]:
    """A sweep over variants of the config file."""
    return [{"variant": name} for name in names]
