"""Exponential moving averages of parameters: those evaluated, and those an objective tracks as its target."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def warm_decay(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """min(decay, (1 + n) / (10 + n)): early averages follow the parameters instead of their initial values."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def name(decay: float) -> str:
    """The key of an EMA in the state: its decay as text."""
    return f"{decay:g}"
