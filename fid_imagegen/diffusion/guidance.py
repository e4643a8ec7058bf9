"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Levels = Float[Array, "batch"]


def lerp(unconditional: Images, conditional: Images, scale: float | Float[Array, ""]) -> Images:
    """unconditional + scale (conditional - unconditional): 1 is no guidance, above 1 follows the condition more than that."""
    return unconditional + scale * (conditional - unconditional)


def guided(
    predict: Callable[[Images, Levels], Images], scale: float | Float[Array, ""]
) -> Callable[[Images, Levels], Images]:
    """Guided predictions for a batch from one evaluation at twice the batch.

    `predict` is bound to the conditions of 2 x batch images: first those to follow, then the unconditional ones. It
    returns what its form's `predict` does, which is affine in x0, so that mixing it mixes the denoised images.
    """

    def mixed(x: Images, t_B: Levels) -> Images:
        both = predict(jnp.concatenate([x, x]), jnp.concatenate([t_B, t_B]))
        conditional, unconditional = jnp.split(both, 2)
        return lerp(unconditional, conditional, scale)

    return mixed
