"""The cosine noise schedule of Würstchen (Pernias et al. 2024, arXiv 2306.00637) on a continuous t, and its sampling loop.

    x_t = sqrt(alpha_bar(t)) x_0 + sqrt(1 - alpha_bar(t)) eps

t is in [0, 1]: 0 is almost clean, 1 almost noise. Levels t_B are one an image. Parity with diffusers' DDPMWuerstchenScheduler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.diffusion.noise import example_normal
from fid_imagegen.diffusion.preconditioning import per_image

Images = Float[Array, "batch height width channels"]
Levels = Float[Array, "batch"]
Noise = Callable[[Int[Array, ""]], Images]

OFFSET = 0.008
SMALLEST, LARGEST = 0.0001, 0.9999  # clamp of alpha_bar: neither pure noise nor a clean image
# Two thirds of the 29 evaluations go to the first third of the path, where the picture is composed.
DEFAULT_STAGE_C_TIMESTEPS = np.concatenate([np.linspace(1, 2 / 3, 20), np.linspace(2 / 3, 0, 11)[1:]])


def alpha_bar(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Share of the signal in the variance of x_t: cos^2((t + s)/(1 + s) pi/2) / cos^2(s/(1 + s) pi/2), clamped."""
    # The cosine as the sine of the rest to pi / 2: near t = 1 a float32 cosine has lost most of its digits.
    signal = jnp.sin((1 - t) / (1 + OFFSET) * (np.pi / 2)) / np.cos(OFFSET / (1 + OFFSET) * (np.pi / 2))
    return jnp.clip(signal**2, SMALLEST, LARGEST)


def time_of_angle(angle: Float[Array, "..."]) -> Float[Array, "..."]:
    """The t in [0, 1] at which alpha_bar(t) = cos^2(angle), but for the clamp."""
    sine = jnp.cos(angle) * np.cos(OFFSET / (1 + OFFSET) * (np.pi / 2))
    return jnp.clip(1 - (1 + OFFSET) * (2 / np.pi) * jnp.arcsin(sine), 0, 1)


def training_times(keys_B: Key[Array, "batch"]) -> Levels:
    """t ~ clamp(1.08 (1 - U) + 0.001, 0.001, 1), so that 7.5 % of the examples are exactly at t = 1; one key an example."""
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    return jnp.clip((1 - uniform_B) * 1.08 + 0.001, 0.001, 1.0)


def p2_weight(t_B: Levels) -> Levels:
    """(1 + SNR)^-1 = 1 - alpha_bar, as the released code has it; the paper prints (1 - alpha_bar) / (1 + alpha_bar)."""
    return 1 - alpha_bar(t_B)


def add_noise(x0: Images, eps: Images, t_B: Levels) -> Images:
    """x_t of clean x0 and standard normal eps."""
    signal = per_image(alpha_bar(t_B))
    return jnp.sqrt(signal) * x0 + jnp.sqrt(1 - signal) * eps


def ddpm_step(x: Images, eps: Images, t_B: Levels, next_B: Levels, noise: Images) -> Images:
    """x_t -> x_next by the DDPM posterior of the predicted `eps`; `noise` is standard normal, not added at next = 0."""
    signal, signal_next = per_image(alpha_bar(t_B)), per_image(alpha_bar(next_B))
    kept = signal / signal_next
    mean = (x - (1 - kept) * eps / jnp.sqrt(1 - signal)) / jnp.sqrt(kept)
    deviation = jnp.sqrt((1 - kept) * (1 - signal_next) / (1 - signal))
    return mean + jnp.where(per_image(next_B) > 0, deviation, 0) * noise


def sampling_times(steps: int) -> np.ndarray:
    """`steps` + 1 levels from 1 to 0, the last of which is never evaluated."""
    if steps < 1:
        raise ValueError(f"found {steps} sampling steps, expected at least 1")
    return np.linspace(1, 0, steps + 1)


def keyed_noise(keys_B: Key[Array, "batch"], shape: tuple[int, int, int]) -> Noise:
    """noise(i), standard normal [batch, *shape] of step i from one key an image; i = 0 is where sampling starts."""
    return lambda i: example_normal(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B), shape)


def sample_step(
    predict: Callable[[Images, Levels], Images],
    step: Callable[[Images, Images, Levels, Levels, Images], Images],
    x: Images,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Images,
) -> Images:
    """x at level t -> x at level t_next: one evaluation of `predict(x, t_B)`, one `step(x, prediction, t_B, next_B, noise)`."""
    t_B, next_B = (jnp.full(x.shape[:1], level) for level in (t, t_next))
    return step(x, predict(x, t_B), t_B, next_B, noise)


def sample(
    predict: Callable[[Images, Levels], Images],
    step: Callable[[Images, Images, Levels, Levels, Images], Images],
    x: Images,
    times: Float[np.ndarray, "levels"],
    noise: Noise,
) -> Images:
    """From x at times[0] to times[-1], as one scan of `sample_step`; step i >= 1 is given `noise(i)`.

    Stage B and Stage C sample through this with a form of `targets.FORMS`: `predict` is the network's prediction, guided
    (`guidance.guided`) or not, and `step` is the form's. A caller that reports progress calls `sample_step` itself.
    """
    times = jnp.asarray(times, float)

    def body(x, i):
        return sample_step(predict, step, x, times[i - 1], times[i], noise(i)), None

    return jax.lax.scan(body, x, jnp.arange(1, len(times)))[0]
