"""Image functions of CelebA at 128x128: the recipe of configs/celeba64_cm_func.py, at 256 tokens of 8x8 pixels.

    python -m fid_imagegen.train --config configs/celeba128_cm_func.py --workdir runs/celeba128 --config.data.path=TFDS_DIR

Arguments as there: `paper`, `runlocal`. Not yet reproduced.
"""

from configs import celeba64_cm_func


def get_config(arg: str = ""):
    """The better recipe at 128 px."""
    return celeba64_cm_func.build(128, arg)


get_sweep = celeba64_cm_func.get_sweep
