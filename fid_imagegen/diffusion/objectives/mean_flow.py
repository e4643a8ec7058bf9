"""MeanFlow in pixels with a network of clean images (Lu et al. 2026, arXiv 2601.22158; Geng et al. 2025, 2505.13447).

On z_t = (1 - t) x0 + t e the mean velocity over [r, t] is u(z_t, r, t) = (z_t - G) / max(t, 0.05), G the network's clean image.
It satisfies v = u + (t - r) du/dt, and the loss holds the right side, its derivative behind a stop-gradient, to v = e - x0
(improved MeanFlow, arXiv 2512.02012: a loss of velocities, the derivative along the network's own velocity u(z_t, t, t)).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.objectives.objective import Objective
from fid_imagegen.diffusion.preconditioning import PRECONDITIONINGS, flow_time, mean_velocity, per_image


@dataclasses.dataclass(frozen=True)
class MeanFlow(Objective):
    """t and r are the larger and smaller of two logit-normal draws; `instant` of the images have r = t, which is flow matching.

    power, offset: weight 1 / (squared error + offset)^power of each image, behind a stop-gradient.
    """

    logit_mean: float = -0.4
    logit_deviation: float = 1.0
    instant: float = 0.75
    power: float = 1.0
    offset: float = 0.01

    any_distance = False
    differentiates_level = True
    sampler = "flow"

    def __post_init__(self):
        if self.form != PRECONDITIONINGS["mean_flow"]:
            raise ValueError(
                "found objective 'meanflow' with a network of another form, expected 'mean_flow', whose network is told both "
                "ends of a jump; set config.preconditioning='mean_flow'"
            )
        if not 0 <= self.instant <= 1:
            raise ValueError(f"found instant={self.instant}, expected a share from 0 to 1; change config.objective")

    def times(self, keys: Key[Array, "batch"]) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """(t, r) of every image, r <= t."""
        normal = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (2,)))(keys)
        low, high = (flow_time(sigma, self.noise) for sigma in (self.noise.sigma_min, self.noise.sigma_max))
        drawn = jnp.clip(jax.nn.sigmoid(self.logit_mean + self.logit_deviation * normal), low, high)
        t_B, r_B = drawn.max(axis=1), drawn.min(axis=1)
        equal = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys) < self.instant
        # Flow matching takes the first draw: the larger of two would lean to the noisy end.
        return jnp.where(equal, drawn[:, 0], t_B), jnp.where(equal, drawn[:, 0], r_B)

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image."""
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        (t_B, r_B), e = self.times(keys[:, 0]), self.draw(keys[:, 1], x0.shape[1:])
        z = per_image(1 - t_B) * x0 + per_image(t_B) * e

        over = lambda z, t_B, r_B: mean_velocity(nets["student"], z, t_B, r_B, cond, key=key)  # noqa: E731
        tangent = jax.lax.stop_gradient(over(z, t_B, t_B))
        u, du_dt = jax.jvp(lambda z, t_B: over(z, t_B, r_B), (z, t_B), (tangent, jnp.ones_like(t_B)))
        velocity = u + per_image(t_B - r_B) * jax.lax.stop_gradient(du_dt)
        error = jnp.sum((velocity - (e - x0)) ** 2, axis=(1, 2, 3))
        weight = jax.lax.stop_gradient((error + self.offset) ** -self.power)
        return weight * error, {"velocity_error": jnp.mean(error) / x0[0].size}
