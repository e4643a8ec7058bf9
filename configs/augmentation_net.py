"""A small classifier of augmentations: the feature distance of AYT (arXiv 2510.00658), trained on the images themselves.

    python -m fid_imagegen.train --config configs/augmentation_net.py --workdir runs/augmentation_net
    python -m fid_imagegen.train --config configs/digits_cm_func.py --workdir runs/digits --config.distance=augmentations \
        --config.init.augmentation_net=runs/augmentation_net

Seen on digits: 91.6 % of held-out images named rightly, mean of the 13 labels (by chance 7.7 %), 14 minutes on 2 busy cores.
Arguments: `cifar10` instead of digits; `runlocal` for seconds. AYT's is VGG16, trained for 400,000 steps of 512 images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = ""):
    """Digits, as in `configs/digits_cm_func.py`; 13 labels, for they are grey."""
    config = common.training("augmentation_net")
    config.data.update({"source": "digits", "image_size": 8, "channels": 1, "holdout_every": 4})
    config.model = ConfigDict({"widths": common.AUGMENTATION_WIDTHS})
    config.optimizers.augmentation_net = common.optimizer("adam", 1e-3, warmup_steps=100, schedule="cosine")
    config.init.augmentation_net = ""
    config.sharding.rules = ((r".*", "fsdp"),)
    config.num_steps, config.ema_decays = 1000, (0.99,)
    config.log.sample_every = 500
    return common.finish(config, arg, {"cifar10": cifar10, "runlocal": runlocal})


def cifar10(config):
    """As in `configs/cifar10_cm_func.py`, 15 labels. Not yet run in full."""
    config.data.update({"source": "npz", "path": "cifar10_train.npz", "image_size": 32, "channels": 3, "flip": True})
    config.data.holdout_every = 10
    config.num_steps, config.ema_decays = 100_000, (0.999,)


def runlocal(config):
    """It shows that the config runs, nothing more."""
    config.num_steps, config.batch_size, config.checkpoint.every = 8, 8, 4
    config.log.update({"every": 2, "sample_every": 8, "num_samples": 4})


def get_sweep():
    """`seed`."""
    return {"seed": [{"seed": seed} for seed in (0, 1, 2)]}
