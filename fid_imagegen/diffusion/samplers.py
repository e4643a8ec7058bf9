"""Sampling from consistency functions (Song et al. 2023, Alg. 1), from denoisers (EDM, Karras et al. 2022, Alg. 1), and along
mean velocities (MeanFlow, Geng et al. 2025, arXiv 2505.13447).

All hand over the noisy image and level of the LAST evaluation, which is the caller's: it keeps the image function. EDM's is at
sigma_min, where f is x and nothing is left of the function: a diffusion sample is pixels, at other sizes interpolated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.noise import NoiseRange, example_normal, karras_sigma
from fid_imagegen.diffusion.preconditioning import per_image

Images = Float[Array, "batch height width channels"]
# f of (x, sigma); of (x, sigma, lower), which `flow_input` alone asks for, the point of x's path at the lower level.
Denoise = Callable[..., Images]

LAST_SIGMA = 0.821  # the second level of iCT's and ECT's two-step samples on CIFAR-10


def sampling_sigmas(steps: int, noise: NoiseRange) -> np.ndarray:
    """Levels of a `steps`-step sample: sigma_max alone, or log-spaced from sigma_max down to 0.821."""
    if steps < 1:
        raise ValueError(f"found {steps} sampling steps, expected at least 1")
    if steps == 1:
        return np.array([noise.sigma_max])
    if noise.sigma_min >= LAST_SIGMA:
        raise ValueError(
            f"found {steps} sampling steps and sigma_min {noise.sigma_min}, expected one below the last level, {LAST_SIGMA}; "
            "take one step"
        )
    return np.geomspace(noise.sigma_max, min(LAST_SIGMA, noise.sigma_max), steps)


def consistency_input(
    denoise: Denoise,
    keys: Key[Array, "batch"],
    shape: tuple[int, int, int],
    *,
    steps: int,
    noise: NoiseRange,
) -> tuple[Images, Float[Array, "batch"]]:
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


def heun_step(
    denoise: Denoise, x: Images, sigma_B: Float[Array, "batch"], lower_B: Float[Array, "batch"], *, smallest: float
) -> Images:
    """From one level of the probability-flow path dx/dsigma = (x - D(x, sigma)) / sigma to a lower one, above 0.

    At `smallest` a net answers its input, by the boundary condition, and knows no slope: a step that ends there is Euler's.
    """
    slope = (x - denoise(x, sigma_B)) / per_image(sigma_B)
    euler = x + per_image(lower_B - sigma_B) * slope
    end = (euler - denoise(euler, lower_B)) / per_image(lower_B)
    end = jnp.where(per_image(lower_B) > 1.001 * smallest, end, slope)  # levels of a grid are not exact
    return x + per_image(lower_B - sigma_B) * (slope + end) / 2


def heun_input(
    denoise: Denoise, keys: Key[Array, "batch"], shape: tuple[int, int, int], *, steps: int, noise: NoiseRange
) -> tuple[Images, Float[Array, "batch"]]:
    """As `consistency_input`, down EDM's path: steps - 1 of Heun to sigma_min, two evaluations each; the last is the caller's.

    With one step the last evaluation is the first, of pure noise: a denoiser's answer to that is the mean of the data.
    """
    if steps < 1:
        raise ValueError(f"found {steps} sampling steps, expected at least 1")
    batch = keys.shape[0]
    x = noise.sigma_max * example_normal(keys, shape)
    if steps == 1:
        return x, jnp.full((batch,), noise.sigma_max, jnp.float32)
    sigmas = karras_sigma(jnp.arange(steps, dtype=jnp.float32), jnp.int32(steps), noise)
    level = lambda sigma: jnp.full((batch,), sigma)  # noqa: E731
    down = lambda x, pair: (heun_step(denoise, x, *map(level, pair), smallest=noise.sigma_min), None)  # noqa: E731
    x, _ = jax.lax.scan(down, x, (sigmas[:-1], sigmas[1:]))
    return x, level(sigmas[-1])


def flow_input(
    denoise: Denoise, keys: Key[Array, "batch"], shape: tuple[int, int, int], *, steps: int, noise: NoiseRange
) -> tuple[Images, Float[Array, "batch"]]:
    """As `consistency_input`, along the path without fresh noise: times t = sigma / (1 + sigma) evenly down to one step above 0.

    `denoise(x, sigma, lower)` is the point of x's path at a lower level, for which a network must be told both ends.
    """
    if steps < 1:
        raise ValueError(f"found {steps} sampling steps, expected at least 1")
    left = 1 - np.arange(steps) / steps
    sigmas = left * noise.sigma_max / (1 + (1 - left) * noise.sigma_max)
    x = noise.sigma_max * example_normal(keys, shape)
    level = lambda sigma: jnp.full(keys.shape, sigma, x.dtype)  # noqa: E731
    for sigma, lower in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = denoise(x, level(sigma), level(lower))
    return x, level(sigmas[-1])


SAMPLERS = {"consistency": consistency_input, "flow": flow_input, "heun": heun_input}
