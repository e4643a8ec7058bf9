"""Sampling from consistency functions (Song et al. 2023, Alg. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.noise import NoiseRange, example_normal

LAST_SIGMA = 0.821  # the second level of iCT's and ECT's two-step samples on CIFAR-10


def sampling_sigmas(steps: int, noise: NoiseRange) -> np.ndarray:
    """Levels of a `steps`-step sample: sigma_max alone, or log-spaced from sigma_max down to 0.821."""
    if steps < 1:
        raise ValueError(f"found {steps} sampling steps, expected at least 1")
    return (
        np.geomspace(noise.sigma_max, min(LAST_SIGMA, noise.sigma_max), steps)
        if steps > 1
        else np.array([noise.sigma_max])
    )


def last_input(
    denoise: Callable[[Float[Array, "batch height width channels"], Float[Array, "batch"]], Array],
    keys: Key[Array, "batch"],
    shape: tuple[int, int, int],
    *,
    steps: int,
    noise: NoiseRange,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch"]]:
    """The noisy image and level that the LAST evaluation of a `steps`-step sample receives.

    All steps but the last run on the native grid: x <- f(x, sigma) + sqrt(sigma_next^2 - sigma_min^2) z. The last one is
    the caller's, who keeps its image function. `denoise(x, sigma)` is f; `keys` are one an image.
    """
    sigmas = sampling_sigmas(steps, noise)
    batch = keys.shape[0]
    x = sigmas[0] * example_normal(keys, shape)
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True), start=1):
        fresh = example_normal(jax.vmap(lambda key, s=step: jax.random.fold_in(key, s))(keys), shape)
        x = denoise(x, jnp.full((batch,), sigma)) + np.sqrt(following**2 - noise.sigma_min**2) * fresh
    return x, jnp.full((batch,), sigmas[-1], jnp.float32)
