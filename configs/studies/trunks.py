"""Do the blocks of language models make a better trunk? RMS norms, rotary positions and SwiGLU against DiT's, each alone and all.

    python -m launch.run --config configs/studies/trunks.py --sweep trunk,seed
    python -m benchmarks.study --experiment runs/trunks

Arms see the same images in the same order and cost the same: 89 MFLOP an image and training step, by XLA's count.
"""

from configs import common
from configs.studies import common as studies


def get_config(arg: str = ""):
    """Patches of 2, for sixteen tokens have more places than four; DiT's blocks, unless a variant is named."""
    config = studies.digits()
    config.model.patch = 2
    return common.finish(config, arg, VARIANTS)


def rms(config) -> None:
    """RMS norms in trunk and predictor."""
    config.model.norm = "rms"


def rotary(config) -> None:
    """Rotary positions beside the fixed ones."""
    config.model.rotary = True


def swiglu(config) -> None:
    """Gated MLPs in trunk and predictor."""
    config.model.mlp = "swiglu"


def all_three(config) -> None:
    """The three together."""
    config.model.update({"norm": "rms", "rotary": True, "mlp": "swiglu"})


VARIANTS = {"plain": lambda config: None, "rms": rms, "rotary": rotary, "swiglu": swiglu, "all": all_three}


def get_sweep():
    """`trunk` and `seed`."""
    return {"trunk": studies.arms(*VARIANTS), "seed": studies.SEEDS}
