"""Zero-shot edits by a consistency function (Song et al. 2023, arXiv 2303.01469, Alg. 4).

What is known of an image is its projection on a linear space: the pixels outside a hole, its luma, the means of its blocks.
After every step what the generator says of that space gives way to what is known.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce, repeat
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.noise import NoiseRange, example_normal
from fid_imagegen.diffusion.samplers import Denoise, Images, sampling_sigmas

Projection = Callable[[Images], Images]
LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)  # ITU-R BT.601, as in the paper


def inpainting(mask_HW: Float[Array, "height width"]) -> Projection:
    """Known where `mask_HW` is 1."""
    return lambda x: x * mask_HW[None, :, :, None]


def colourisation() -> Projection:
    """Known is the luma; a grey image has the luma of its one value."""
    direction = LUMA / np.linalg.norm(LUMA)
    return lambda x: jnp.sum(x * direction, axis=-1, keepdims=True) * direction


def super_resolution(factor: int) -> Projection:
    """Known are the means of blocks of `factor` x `factor` pixels."""

    def project(x):
        means = reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=factor, j=factor)
        return repeat(means, "b h w c -> b (h i) (w j) c", i=factor, j=factor)

    return project


def replaced(x: Images, known: Images, project: Projection) -> Images:
    """`x` with what is known in the place of its projection."""
    return x + known - project(x)


def edit_input(
    denoise: Denoise, known: Images, project: Projection, keys: Key[Array, "batch"], *, steps: int, noise: NoiseRange
) -> tuple[Images, Float[Array, "batch"]]:
    """The noisy image and level of the LAST evaluation of an edit, down the levels of a sample of as many steps.

    The paper goes on down to sigma_min, where f is x: pixels, of which no image function is left.

    known: the projection of the image; the rest of it is not looked at.
    """
    sigmas = jnp.asarray(sampling_sigmas(steps, noise), jnp.float32)
    level = lambda sigma: jnp.full((known.shape[0],), sigma)  # noqa: E731
    fresh = lambda step: example_normal(jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), known.shape[1:])  # noqa: E731

    def down(x, following):
        step, (sigma, lower) = following
        clean = replaced(denoise(x, level(sigma)), known, project)
        return clean + jnp.sqrt(lower**2 - noise.sigma_min**2) * fresh(step), None

    x = known + sigmas[0] * fresh(0)
    x, _ = jax.lax.scan(down, x, (jnp.arange(1, steps), (sigmas[:-1], sigmas[1:])))
    return x, level(sigmas[-1])
