"""Image functions of your own folder or zip of PNG/JPEG images (docs/own_data.md).

    python -m fid_imagegen.train --config configs/own_images.py --workdir runs/mine --config.data.path=FOLDER_OR_ZIP

Arguments: `cpu` trains the tiny preset at 32 px on 2 cores; `runlocal` a minute. Expected quality: it depends on
the images; the runs on LFW faces and CIFAR-10 are in docs/results.md.
"""

from configs import common
from configs.cifar10_cm_func import cpu as cifar10_cpu


def get_config(arg: str = ""):
    """Preset S at 64 px with ect on the clean-image blend."""
    config = common.base()
    config.data.update({"source": "folder", "image_size": 64, "channels": 3, "flip": True, "holdout_every": 10})
    config.model.update({"preset": "S", "patch": 4, "dtype": "bfloat16"})
    config.optimizers.generator = common.optimizer("radam", 1e-4, grad_clip=1.0)
    return common.finish(config, arg, {"cpu": cpu})


def cpu(config):
    """The tiny preset at 32 px."""
    cifar10_cpu(config)
    config.data.image_size = 32


def get_sweep():
    """Named sweeps: lists of overrides."""
    return {"seed": [{"seed": seed} for seed in (0, 1, 2)]}
