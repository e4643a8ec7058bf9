"""Simplified continuous-time consistency training (Lu & Song 2025, arXiv 2410.11081): no levels to choose, one JVP a step.

On TrigFlow's path x_t = cos t x0 + sin t z, z of deviation sigma_data, t = arctan(sigma / sigma_data), every consistency
function has a velocity F = (cos t x_t - f) / (sigma_data sin t), f = cos t x_t - sin t sigma_data F. The objective moves F
along the derivative of f down the path.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fid_imagegen.diffusion.noise import lognormal_sigmas
from fid_imagegen.diffusion.objectives.objective import Levels, Objective, Own
from fid_imagegen.diffusion.preconditioning import angle, per_image

WEIGHT = "level_weight"


def cosine_series(group: dict[str, Float[Array, "cosines"]], t_B: Levels) -> Levels:
    """w(t) = sum_k w_k cos 2kt: any smooth function of the times 0 to pi / 2, and linear in its parameters."""
    order = jnp.arange(len(group["cosines"]))
    return jnp.cos(2 * order * t_B[:, None]) @ group["cosines"]


@dataclasses.dataclass(frozen=True)
class ContinuousConsistencyTraining(Objective):
    """Tangents normalised and warmed up (Alg. 1); their distance is the square by its mathematics.

    warmup: steps over which the tangent's unstable half grows in. normaliser: c of g / (||g|| + c). distilled: the path's
    direction is the teacher's (sCD), not that of the noise that was added (sCT). weight_cosines: terms of the learned weight of
    levels, in its group `level_weight`, w = 0 at first; 0: none. Where there is one, the loss is e^w(t) times itself less w(t)
    (eq. 8): at its smallest e^w is one over the mean loss of the level, and every level weighs the same.
    Deviation: the weight is a cosine series for the layer on random Fourier features of EDM2 (arXiv 2312.02696).
    """

    warmup: int = 10_000
    normaliser: float = 0.1
    log_mean: float = -1.0
    log_deviation: float = 1.4
    distilled: bool = False
    weight_cosines: int = 0

    any_distance = False
    differentiates_level = True

    def __post_init__(self):
        if self.weight_cosines < 0:
            raise ValueError(
                f"found weight_cosines={self.weight_cosines}, expected 0 or more terms; change config.objective"
            )

    @property
    def needs_teacher(self):
        return self.distilled

    @property
    def own(self):
        """The learned weight of levels."""
        zeros = lambda key: {"cosines": jnp.zeros(self.weight_cosines)}  # noqa: E731
        return {WEIGHT: Own(zeros, cosine_series)} if self.weight_cosines else {}

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image: mean square of F - stop_gradient(F + g), g the normalised tangent; weighed, if a weight is learned."""
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
        metrics = {"tangent": jnp.mean(norm), "ramp": jnp.float32(ramp)}
        if WEIGHT not in self.own:
            return loss, metrics
        weight = nets[WEIGHT](t_B)
        metrics |= {"unweighted": jnp.mean(loss), WEIGHT: jnp.mean(weight)}
        return jnp.exp(weight) * loss - weight, metrics
