"""The paper's claim: at batch 32 consistency training of a U-Net oscillates, that of Transformers does not. Its curve shows.

    python -m launch.run --config configs/studies/batches.py --sweep network,batch,seed
    python -m benchmarks.curves --experiment runs/batches

`ct` as Song et al. 2023 but for LPIPS, whose weights are not at hand, and for 20 levels at the end: its target hands what is
known down one level at a time, and 150 of them need more steps than these. Equal images: 96,000 at every batch size.
"""

from configs import common
from configs.studies import common as studies

IMAGES = 96_000


def get_config(arg: str = ""):
    """The generator of functions, unless a variant is named."""
    config = studies.digits()
    config.objective, config.distance, config.preconditioning = common.objective("ct", s1=20), "l2", "edm"
    config.optimizers.generator = common.optimizer("radam", 4e-4)
    config.log.every = 1
    return common.finish(config, arg, VARIANTS)


def dit(config) -> None:
    """DiT."""
    config.model.update({"network": "dit", "depth": 10})


def unet(config) -> None:
    """NCSN++ of 16 and 32 channels: 41 MFLOP an image and step, as the others."""
    config.model.update({"network": "unet", "preset": "ncsnpp_32"})
    config.sharding.rules = common.UNET_RULES
    config.model.unet.update({"stem": 16, "widths": (16, 32), "blocks": 2, "attention_levels": (1,)})


VARIANTS = {"function": lambda config: None, "dit": dit, "unet": unet}


def get_sweep():
    """`network`, `batch` and `seed`. Micro-batches of 128: convolutions of 512 images are five times slower on a CPU."""
    batches = [
        {"batch_size": size, "accumulate": max(1, size // 128), "num_steps": IMAGES // size}
        for size in (32, 128, 512, 2048)
    ]
    return {"network": studies.arms(*VARIANTS), "batch": batches, "seed": studies.SEEDS}
