"""CM-UNet on ImageNet at 64x64: ADM, with labels, of the size of the public consistency models.

    python -m fid_imagegen.convert --unet diffusers-cd_imagenet64_l2/unet --out runs/public      # their weights, to sample from
    python -m fid_imagegen.train --config configs/imagenet64_cm_unet.py --workdir runs/imagenet64 --config.data.path=TFDS_DIR \
        --config.init.generator=runs/public                                                      # or to go on from

Argument: `runlocal` a minute on 2 cores, on synthetic images. Preparing the set needs the extra `[tfds]`. Not run at full size.
"""

from configs import common


def get_config(arg: str = ""):
    """The public models' network and preconditioning; ect at batch 512."""
    config = common.base()
    config.data.update(
        {"source": "tfds:imagenet_resized/64x64", "image_size": 64, "channels": 3, "flip": True, "holdout_every": 100}
    )
    config.model.update(
        {"network": "unet", "preset": "adm_64", "num_classes": 1000, "dtype": "bfloat16", "remat": True}
    )
    config.sharding.rules = common.UNET_RULES
    config.preconditioning, config.batch_size, config.num_steps = "edm", 512, 200_000
    config.optimizers.generator = common.optimizer("radam", 1e-4, grad_clip=1.0)
    return common.finish(config, arg, {"runlocal": runlocal})


def runlocal(config):
    """Shrunk, and on the ten classes of synthetic images, since the data set may not be prepared here."""
    common.runlocal(config)
    config.data.source, config.model.num_classes = "synthetic", 10


def get_sweep():
    """Named sweeps: lists of overrides."""
    return {
        "batch": [{"batch_size": size} for size in (32, 128, 512, 2048)],
        "seed": [{"seed": seed} for seed in (0, 1, 2)],
    }
