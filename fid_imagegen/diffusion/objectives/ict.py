"""Improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189)."""

import dataclasses

import jax
import jax.numpy as jnp

from fid_imagegen.diffusion.noise import (
    check_levels,
    ict_levels,
    karras_cell,
    karras_sigma,
    lognormal_sigmas,
)
from fid_imagegen.diffusion.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTraining(Objective):
    """No target EMA, discrete lognormal levels, doubling curriculum, weight 1 / (sigma_i - sigma_{i+1})."""

    s0: int = 10
    s1: int = 1280
    log_mean: float = -1.1  # one public port's README has +1.1, which fails
    log_deviation: float = 2.0

    def __post_init__(self):
        check_levels(self.s0, self.s1, least=1)

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image; the target is the student itself behind a stop-gradient."""
        count = ict_levels(step, self.num_steps, self.s0, self.s1)
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        drawn = lognormal_sigmas(keys[:, 0], self.log_mean, self.log_deviation, self.noise)
        index = karras_cell(drawn, count, self.noise).astype(jnp.float32)
        sigma, lower = karras_sigma(index, count, self.noise), karras_sigma(index + 1, count, self.noise)
        student = nets["student"]
        loss = self.pair_distance(student, student, x0, cond, sigma, lower, keys=keys[:, 1], key=key)
        return loss / (sigma - lower), {"levels": count.astype(jnp.float32)}
