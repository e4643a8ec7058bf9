"""Image functions of CelebA at 64x64 (tfds:celeb_a, all images; centre crop after resizing the shorter side).

    python -m fid_imagegen.train --config configs/celeba64_cm_func.py --workdir runs/celeba64 --config.data.path=TFDS_DIR

Arguments: `paper` is the function generator's paper (batch 32, 900k iterations, 30 epochs of pre-training, CT with LPIPS);
`runlocal` a minute on 2 cores, on synthetic images. Preparing the set needs the extra `[tfds]`. Not yet reproduced. Other papers
crop CelebA differently (U-ViT: 128x128 around row 121, column 89): state the crop with any distance.
"""

from configs import common


def get_config(arg: str = ""):
    """Preset S with ect on the clean-image blend: the better recipe."""
    return build(64, arg)


def build(image_size: int, arg: str):
    """The recipe at any size: 256 tokens."""
    config = common.base()
    config.data.update(
        {"source": "tfds:celeb_a", "image_size": image_size, "channels": 3, "flip": True, "holdout_every": 10}
    )
    config.model.update({"preset": "S", "patch": image_size // 16, "dtype": "bfloat16"})
    config.optimizers.generator = common.optimizer("radam", 1e-4, grad_clip=1.0)
    return common.finish(config, arg, {"paper": paper, "runlocal": runlocal})


def paper(config):
    """The paper's settings: 900,000 iterations at batch 32 on all 202,599 images."""
    common.paper(config, images=202_599)
    config.num_steps = 900_000
    config.data.update({"split": "train+validation+test", "holdout_every": 0})


def runlocal(config):
    """Shrunk, and on synthetic images, since the data set may not be prepared here."""
    common.runlocal(config)
    config.data.source = "synthetic"


def get_sweep():
    """Named sweeps: lists of overrides."""
    return {
        "batch": [{"batch_size": size} for size in (32, 64, 128)],
        "seed": [{"seed": seed} for seed in (0, 1, 2)],
    }
