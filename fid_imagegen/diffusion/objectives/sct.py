"""Simplified continuous-time consistency training (Lu & Song 2025, arXiv 2410.11081): no levels to choose, one JVP a step.

On TrigFlow's path x_t = cos t x0 + sin t z, z of deviation sigma_data, t = arctan(sigma / sigma_data), every consistency
function has a velocity F = (cos t x_t - f) / (sigma_data sin t), f = cos t x_t - sin t sigma_data F. The objective moves F
along the derivative of f down the path.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fid_imagegen.diffusion.noise import lognormal_sigmas
from fid_imagegen.diffusion.objectives.objective import Objective
from fid_imagegen.diffusion.preconditioning import angle, per_image


@dataclasses.dataclass(frozen=True)
class ContinuousConsistencyTraining(Objective):
    """Tangents normalised and warmed up (Alg. 1); their distance is the square by its mathematics.

    warmup: steps over which the tangent's unstable half grows in. normaliser: c of g / (||g|| + c). distilled: the path's
    direction is the teacher's (sCD), not that of the noise that was added (sCT).
    Deviation: the learned weight of levels is left out; the normalised tangent leaves it little to weigh.
    """

    warmup: int = 10_000
    normaliser: float = 0.1
    log_mean: float = -1.0
    log_deviation: float = 1.4
    distilled: bool = False

    any_distance = False
    differentiates_level = True

    @property
    def needs_teacher(self):
        return self.distilled

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image: mean square of F - stop_gradient(F + g), g the normalised tangent."""
        data = self.noise.sigma_data
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        t_B = angle(lognormal_sigmas(keys[:, 0], self.log_mean, self.log_deviation, self.noise), self.noise)
        cos, sin = per_image(jnp.cos(t_B)), per_image(jnp.sin(t_B))
        z = data * self.draw(keys[:, 1], x0.shape[1:])
        x_t, dx_dt = cos * x0 + sin * z, cos * z - sin * x0

        def velocity(x_t, t_B, net="student", key=key):
            x, sigma_B = x_t / per_image(jnp.cos(t_B)), data * jnp.tan(t_B)
            f = self.f(nets[net], x, sigma_B, cond, key=key)
            return (per_image(jnp.cos(t_B)) * x_t - f) / (data * per_image(jnp.sin(t_B)))

        if self.distilled:
            dx_dt = jax.lax.stop_gradient(data * velocity(x_t, t_B, "teacher", None))

        # Multiplied by cos t sin t the derivative stays bounded at both ends of the path.
        scale_B = jnp.cos(t_B) * jnp.sin(t_B)
        before, derivative = jax.jvp(velocity, (x_t, t_B), (per_image(scale_B) * dx_dt, scale_B))
        ramp = jnp.minimum(1.0, step / max(self.warmup, 1))
        g = -(cos**2) * (data * before - dx_dt) - ramp * (cos * sin * x_t + data * derivative)
        norm = jnp.sqrt(jnp.sum(g**2, axis=(1, 2, 3), keepdims=True))
        wanted = jax.lax.stop_gradient(before + g / (norm + self.normaliser))
        loss = jnp.mean((before - wanted) ** 2, axis=(1, 2, 3))
        return loss, {"tangent": jnp.mean(norm), "ramp": jnp.float32(ramp)}
