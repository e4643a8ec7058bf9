"""What must stand in the network, and which frequencies? edm against x0_blend; the papers' cut-off 1024 against Nyquist; jittered
coordinates against clean ones.

    python -m launch.run --config configs/studies/functions.py --sweep function,seed
    python -m benchmarks.study --experiment runs/functions
    python -m fid_imagegen.sample --workdir runs/functions/UNIT --sizes 8,16,32      # 1x, 2x and 4x, to look at
"""

from configs.studies import common as studies


def get_config(arg: str = ""):
    """x0_blend, the Nyquist rate, clean coordinates, unless a variant is named."""
    config = studies.base(arg)
    config.model.cutoff = "nyquist"
    return studies.finish(config, arg, VARIANTS)


def edm(config) -> None:
    """F stands for noise where there is little of it."""
    config.preconditioning = "edm"


def cutoff_1024(config) -> None:
    """The papers' cut-off, 256 times the Nyquist rate of these images."""
    config.model.cutoff = "1024"


def half_nyquist(config) -> None:
    """The demo's."""
    config.model.cutoff = str(config.data.image_size // 4)


def variational(config) -> None:
    """Coordinates jittered by up to a quarter of a pixel."""
    config.variational = True


def integrated(config) -> None:
    """Waves averaged over a pixel's footprint."""
    config.model.integrated = True


VARIANTS = {
    "x0_blend": lambda config: None,
    "edm": edm,
    "cutoff_1024": cutoff_1024,
    "half_nyquist": half_nyquist,
    "variational": variational,
    "integrated": integrated,
}


def get_sweep():
    """`function` and `seed`."""
    return {"function": studies.arms(*VARIANTS), "seed": studies.SEEDS}
