"""Optimizers from a config: one `optax` chain a parameter group."""

import optax

OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "radam": optax.radam}
SCHEDULES = ("constant", "cosine", "linear")


def schedule(config, num_steps: int) -> optax.Schedule:
    """Learning rate of a step: linear warm-up, then constant, or cosine or linear decay to zero at `num_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, num_steps - warmup)
    if config.schedule not in SCHEDULES:
        raise ValueError(f"found schedule {config.schedule!r}, expected one of {SCHEDULES}; change config.optimizers")
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if not warmup:
        return after
    # The first step of a warm-up already learns: (k + 1) / warmup.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def build(config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of one group (`config.optimizers.<group>`)."""
    if config.name not in OPTIMIZERS:
        raise ValueError(
            f"found optimizer {config.name!r}, expected one of {sorted(OPTIMIZERS)}; change config.optimizers"
        )
    if config.weight_decay and config.name != "adamw":
        raise ValueError(
            f"found weight decay {config.weight_decay} with {config.name}, expected adamw; change config.optimizers"
        )
    decay = {"weight_decay": config.weight_decay} if config.name == "adamw" else {}
    step = OPTIMIZERS[config.name](schedule(config, num_steps), b1=config.b1, b2=config.b2, eps=config.eps, **decay)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), step) if config.grad_clip else step


def build_all(config, groups) -> dict[str, optax.GradientTransformation]:
    """The optimizers of all trained groups; every group must have one, and every one a group."""
    if set(config.optimizers) != set(groups):
        raise ValueError(
            f"found optimizers for {sorted(config.optimizers)}, expected {sorted(groups)}: one a trained group"
        )
    return {group: build(config.optimizers[group], config.num_steps) for group in groups}
