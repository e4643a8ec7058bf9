"""Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548): continuous levels, from denoising to consistency.

The target level r starts at 0, where the target is the clean image and the loss is denoising, and moves towards t:
r = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t). Deviation: r is clamped to sigma_min and not to 0, so that the
boundary condition f(x, sigma_min) = x holds in training as in sampling.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fid_imagegen.diffusion.noise import lognormal_sigmas
from fid_imagegen.diffusion.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class EasyConsistencyTuning(Objective):
    """Weight 1 / (t - r); stages of equal length; the target is the student behind a stop-gradient."""

    q: float = 2.0
    stages: int = 8
    k: float = 8.0
    b: float = 1.0
    log_mean: float = -1.1
    log_deviation: float = 2.0

    def __post_init__(self):
        if self.stages < 1 or self.q <= 1:
            raise ValueError(
                f"found stages={self.stages}, q={self.q}, expected stages >= 1 and q > 1; change config.objective"
            )

    def stage(self, step) -> Float[Array, ""]:
        """The stage of a step: 0 .. stages - 1."""
        return jnp.minimum(step * self.stages // self.num_steps, self.stages - 1).astype(jnp.float32)

    def lower_level(self, t_B: Float[Array, "batch"], stage: Float[Array, ""]) -> Float[Array, "batch"]:
        """r(t) in [sigma_min, t), before the clamp as printed in the paper."""
        gap = (1 + self.k * jax.nn.sigmoid(-self.b * t_B)) / self.q ** (stage + 1)
        return jnp.maximum(t_B * (1 - gap), self.noise.sigma_min)

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image."""
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        sigma = lognormal_sigmas(keys[:, 0], self.log_mean, self.log_deviation, self.noise)
        lower = self.lower_level(sigma, self.stage(step))
        student = nets["student"]
        loss = self.pair_distance(student, student, x0, cond, sigma, lower, keys=keys[:, 1], key=key)
        # Levels within float noise of sigma_min have no pair below them. The clamp keeps their weight finite, and in the last of
        # eight stages lowers that of levels up to 0.005, a hundredth of all.
        return loss / jnp.maximum(sigma - lower, 1e-4), {"stage": self.stage(step)}
