"""Distances between batches of images, per image: [batch, height, width, channels] x 2 -> [batch]. Images in [-1, 1].

LPIPS and AYT's distance are bound to their weights by the task (`models/features/`) and have the same signature.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
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


def laplacian(a: Images, b: Images) -> Float[Array, "batch"]:
    """Mean absolute difference of the bands of two Laplacian pyramids of 2x2 means, each band weighted alike.

    A stand-in for LPIPS where its weights are not at hand: fine bands hold little energy, and l2 leaves them to blur.
    """
    difference, total = a - b, 0.0
    while min(difference.shape[1:3]) > 1:
        height, width = (size // 2 * 2 for size in difference.shape[1:3])
        halves = rearrange(difference[:, :height, :width], "b (h i) (w j) c -> b h w c i j", i=2, j=2)
        coarse = jnp.mean(halves, axis=(-2, -1))
        total += jnp.mean(_absolute(halves - coarse[..., None, None]), axis=(1, 2, 3, 4, 5))
        difference = coarse
    return total + jnp.mean(_absolute(difference), axis=(1, 2, 3))


def unit_gradient(distance: Distance) -> Distance:
    """The distance with its gradient g to `a` brought to norm 1 for each image: AYT's step (Kim et al. 2025, arXiv 2510.00658).

    AYT's loss per image is |a - stop(a - g / |g|)|^2 / 2 under the objective's weight, always 1/2. Here the gradient is the
    same, g / |g|, and the value the distance's, to be watched. Pseudo-Huber's gradient has norm 1 too, so that a learning
    rate suits both. `b` gets none. A norm below 1e-5 counts as 1e-5, so that all is finite where a = b.
    """

    def aligned(a: Images, b: Images) -> Float[Array, "batch"]:
        value_B, gradient = jax.vjp(lambda a: distance(a, b), jax.lax.stop_gradient(a))
        (g,) = gradient(jnp.ones_like(value_B))
        norm = jnp.sqrt(jnp.sum(g**2, axis=(1, 2, 3), keepdims=True))
        unit = g / jnp.maximum(norm, 1e-5)
        value_B, unit = jax.lax.stop_gradient((value_B, unit))
        return value_B + jnp.sum((a - jax.lax.stop_gradient(a)) * unit, axis=(1, 2, 3))

    return aligned


def _absolute(x: Array) -> Array:
    # JAX's own has gradient 1 at 0, where two images are equal.
    return x * jnp.sign(x)


DISTANCES: dict[str, Distance] = {"l2": l2, "laplacian": laplacian, "pseudo_huber": pseudo_huber}
