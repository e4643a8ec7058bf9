"""Which objective is best at equal images? ct, ict, ect, sct and meanflow, one step each, on the same generator and images.

    python -m launch.run --config configs/studies/objectives.py --sweep objective,seed
    python -m benchmarks.study --experiment runs/objectives

All from scratch. meanflow costs a quarter more a step; its embedding of the level, and that of sct, are unscaled.
"""

from configs import common
from configs.studies import common as studies

# The levels that the demo's recipe was tuned to; the published centre and width are for 32 px.
LEVELS = {"log_mean": 0.3, "log_deviation": 1.5}


def get_config(arg: str = ""):
    """ect, unless a variant is named."""
    return studies.finish(studies.base(arg), arg, VARIANTS)


def ct(config) -> None:
    """Song et al. 2023, on the square: LPIPS has no weights here."""
    config.objective, config.distance = common.objective("ct"), "l2"


def ict(config) -> None:
    """Song & Dhariwal 2023, its schedule from 10 to 160 levels in this few steps."""
    config.objective = common.objective("ict", s1=160, **LEVELS)


def sct(config) -> None:
    """Lu & Song 2025, warmed up over a third of training."""
    config.objective, config.distance, config.time = common.objective("sct", warmup=500, **LEVELS), "l2", "angle"
    config.model.update({"level_scale": 1.0, "qk_norm": True})


def sct_weighted(config) -> None:
    """The same with the learned weight of levels."""
    sct(config)
    common.learn_level_weight(config)


def meanflow(config) -> None:
    """Lu et al. 2026."""
    config.objective, config.distance = common.objective("meanflow"), "l2"
    config.preconditioning, config.model.level_scale = "mean_flow", 1.0


VARIANTS = {
    "ct": ct,
    "ict": ict,
    "ect": lambda config: None,
    "sct": sct,
    "sct_weighted": sct_weighted,
    "meanflow": meanflow,
}


def get_sweep():
    """`objective` and `seed`."""
    return {"objective": studies.arms(*VARIANTS), "seed": studies.SEEDS}
