"""Noise levels: grids, discretisation schedules and samplers of levels. `sigma` is a noise standard deviation.

CM is Song et al. 2023 (arXiv 2303.01469), iCT Song & Dhariwal 2023 (2310.14189), ECT Geng et al. 2024 (2406.14548).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

RHO = 7.0


@dataclasses.dataclass(frozen=True)
class NoiseRange:
    """Smallest and largest noise deviation, and the deviation of the data; images are in [-1, 1]."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max or self.sigma_data <= 0:
            raise ValueError(
                f"found {self}, expected 0 < sigma_min < sigma_max and sigma_data > 0; change config.noise"
            )


def karras_sigma(index: Float[Array, "..."], count: Int[Array, ""], noise: NoiseRange) -> Float[Array, "..."]:
    """Level `index` of a decreasing Karras grid of `count` levels (CM eq. in Sec. 5, rho = 7): 0 -> sigma_max."""
    high, low = noise.sigma_max ** (1 / RHO), noise.sigma_min ** (1 / RHO)
    return (high + index / (count - 1) * (low - high)) ** RHO


def check_levels(s0: int, s1: int, *, least: int) -> None:
    """Raises ValueError unless a schedule of levels grows from s0 >= least to s1."""
    if not least <= s0 <= s1:
        raise ValueError(f"found s0={s0}, s1={s1}, expected {least} <= s0 <= s1; change config.objective")


def ct_levels(step: Int[Array, ""], num_steps: int, s0: int, s1: int) -> Int[Array, ""]:
    """N(k) of CM, App. C: ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 levels at step k of K."""
    progress = jnp.asarray(step, jnp.float32) / num_steps
    return jnp.ceil(jnp.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1).astype(jnp.int32) + 1


def ct_target_decay(step: Int[Array, ""], num_steps: int, s0: int, s1: int, mu0: float) -> Float[Array, ""]:
    """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)) of the released CM code.

    The paper prints N(k) without the -1: 0.9, not 0.81, at k = 0.
    """
    return jnp.exp(s0 * jnp.log(mu0) / (ct_levels(step, num_steps, s0, s1) - 1))


def ict_levels(step: Int[Array, ""], num_steps: int, s0: int, s1: int) -> Int[Array, ""]:
    """N(k) of iCT: min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1))."""
    doublings = math.log2(s1 // s0)
    length = max(1, math.floor(num_steps / (doublings + 1)))
    # Beyond the last doubling nothing changes; the clamp keeps 2^stage from overflowing.
    stage = jnp.minimum(step // length, math.ceil(doublings) + 1)
    return jnp.minimum(s0 * 2**stage, s1) + 1


def lognormal_sigmas(
    keys_B: Key[Array, "batch"], mean: float, deviation: float, noise: NoiseRange
) -> Float[Array, "batch"]:
    """ln sigma ~ N(mean, deviation^2), truncated to [sigma_min, sigma_max]; one key an example."""
    low = (jnp.log(noise.sigma_min) - mean) / deviation
    high = (jnp.log(noise.sigma_max) - mean) / deviation
    standard = jax.vmap(lambda key: jax.random.truncated_normal(key, low, high))(keys_B)
    return jnp.clip(jnp.exp(mean + deviation * standard), noise.sigma_min, noise.sigma_max)


def karras_cell(sigma_B: Float[Array, "batch"], count: Int[Array, ""], noise: NoiseRange) -> Int[Array, "batch"]:
    """Index i in 0..count-2 of the grid cell that holds sigma: karras(i) >= sigma > karras(i + 1).

    Drawing sigma from a truncated lognormal and taking its cell is iCT's discrete lognormal, p(i) ~ erf - erf.
    """
    high, low = noise.sigma_max ** (1 / RHO), noise.sigma_min ** (1 / RHO)
    position = (high - sigma_B ** (1 / RHO)) / (high - low) * (count - 1)
    return jnp.clip(jnp.floor(position), 0, count - 2).astype(jnp.int32)


def example_keys(key: Key[Array, ""], row_B: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """One key an example from its row in the global batch, so that slicing a batch never changes its noise."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def example_normal(keys_B: Key[Array, "batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Standard normal noise of `shape` for every example's key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
