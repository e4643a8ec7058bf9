"""Does the generator of functions lose to its twin of one fixed size? Four kinds of functions against DiT and U-ViT.

    python -m launch.run --config configs/studies/generators.py --sweep generator,seed
    python -m benchmarks.study --experiment runs/generators

Arms see the same images in the same order and cost the same: 38 to 42 MFLOP an image and training step, by XLA's count. On faces
(`--config configs/studies/generators.py:faces --experiment faces`) and on CIFAR-10 (`:cifar10`) it is 136 to 158.
"""

from configs.studies import common as studies


def get_config(arg: str = ""):
    """Global functions, unless a variant is named."""
    return studies.finish(studies.base(arg), arg, VARIANTS)


def _unset(config) -> None:
    config.model.update(dict.fromkeys(studies.FUNCTION))


def local_functions(config) -> None:
    """A shared MLP on interpolated features."""
    _unset(config)
    config.model.update({"function": "local64", "extractor_depth": 6})


def patches(config) -> None:
    """A small MLP of every patch's own, fading into its neighbours'."""
    _unset(config)
    config.model.update({"function": "patch32", "extractor_depth": 5})


def pixels(config) -> None:
    """Features of every pixel by nine of DiT's blocks, a shared MLP that reads them."""
    _unset(config)
    config.model.update({"function": "pixel32", "extractor_depth": 8, "predictor_depth": 1})


def dit(config) -> None:
    """DiT of ten blocks."""
    config.model.update({"network": "dit", "depth": 10})


def uvit(config) -> None:
    """U-ViT of eight blocks and the middle one."""
    config.model.update({"network": "uvit", "depth": 8, "width": 88})


VARIANTS = {
    "global": lambda config: None,
    "local": local_functions,
    "patches": patches,
    "pixels": pixels,
    "dit": dit,
    "uvit": uvit,
}


def get_sweep():
    """`generator` and `seed`."""
    return {"generator": studies.arms(*VARIANTS), "seed": studies.SEEDS}
