"""Distances between batches of images, per image: [batch, height, width, channels] x 2 -> [batch]. Images in [-1, 1].

LPIPS is bound to its weights by the task (`models/features/lpips.py`) and has the same signature.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Distance = Callable[[Images, Images], Float[Array, "batch"]]


def l2(a: Images, b: Images) -> Float[Array, "batch"]:
    """Mean squared difference, as in CM."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def pseudo_huber(a: Images, b: Images, *, factor: float = 0.00054) -> Float[Array, "batch"]:
    """sqrt(||a - b||^2 + c^2) - c on the WHOLE image's norm, c = factor sqrt(dimensions) (iCT eq. 6-7).

    Ports that apply it per element keep a c sized for the image and stall. factor = 0 is ECT's plain norm; the epsilon
    keeps its gradient finite where a = b.
    """
    c = factor * math.sqrt(math.prod(a.shape[1:]))
    return jnp.sqrt(jnp.sum((a - b) ** 2, axis=(1, 2, 3)) + c**2 + 1e-12) - c


DISTANCES: dict[str, Distance] = {"l2": l2, "pseudo_huber": pseudo_huber}
