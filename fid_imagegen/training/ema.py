"""Averages of parameters over training: those evaluated, and those an objective tracks as its target.

Beside exponential averages stand those of a power of the step, average(t) ~ integral of tau^gamma theta(tau) (Karras et al. 2024,
arXiv 2312.02696, Sec. 3): as training goes on they reach back over an equal share of it. From snapshots of two of them the
average of any other width, at any step, is found afterwards by least squares between their profiles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Decay = Callable[[Int[Array, ""]], Float[Array, ""]]


def averages(config) -> dict[str, Decay]:
    """The averages of a config by the key they have in the state: name -> decay(step). ValueError for what cannot be."""
    if config.ema_snapshots and not config.ema_widths:
        raise ValueError(
            "found ema_snapshots without ema_widths, expected two widths such as (0.05, 0.1); set config.ema_widths"
        )
    for decay in config.ema_decays:
        if not 0 <= decay < 1:
            raise ValueError(f"found an EMA decay of {decay}, expected 0 to below 1; change config.ema_decays")
    exponential = {name(decay): functools.partial(warm_decay, decay) for decay in config.ema_decays}
    powers = {width_name(width): functools.partial(power_decay, exponent(width)) for width in config.ema_widths}
    return exponential | powers


def warm_decay(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """min(decay, (1 + n) / (10 + n)): early averages follow the parameters instead of their initial values."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def power_decay(gamma: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """(1 - 1 / t)^(gamma + 1) for update t = step + 1: the first average is the parameters themselves."""
    return (1 - 1 / (step + 1.0)) ** (gamma + 1)


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def name(decay: float) -> str:
    """The key of an EMA in the state: its decay as text."""
    return repr(decay)


def width_name(width: float) -> str:
    """The key of a power average in the state."""
    return f"width{width:g}"


def exponent(width: float) -> float:
    """gamma of the power average whose profile deviates by `width` of training: sqrt(gamma + 1) / (gamma + 2) / sqrt(gamma + 3).

    Raises ValueError for widths outside (0, 0.28): at 0.289 all of training counts alike.
    """
    if not 0 < width < 0.28:
        raise ValueError(f"found a relative width {width}, expected one between 0 and 0.28, such as 0.1")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def combination(
    snapshots: Sequence[tuple[float, float]], wanted: tuple[float, float]
) -> Float[np.ndarray, "snapshots"]:
    """Weights of snapshots, (step, width) each, whose sum has the profile closest to that of the `wanted` (step, width).

    They sum to 1, as in the released code of EDM2: least squares alone would shrink what never moved.
    """
    profiles = [(step, exponent(width)) for step, width in snapshots]
    gram = np.array([[_product(one, other) for other in profiles] for one in profiles])
    target = np.array([_product(one, (wanted[0], exponent(wanted[1]))) for one in profiles])
    weights = np.linalg.lstsq(gram, target, rcond=None)[0]
    return weights / weights.sum()


def _product(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Integral of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], each zero after its own t."""
    (t, gamma), (later, delta) = sorted((one, other))
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (t / later) ** delta / later
