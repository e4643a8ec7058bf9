"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, Alg. 2): a diffusion teacher says which way the path goes."""

import dataclasses

import jax
import jax.numpy as jnp

from fid_imagegen.diffusion.noise import karras_sigma
from fid_imagegen.diffusion.objectives.objective import Objective
from fid_imagegen.diffusion.preconditioning import per_image
from fid_imagegen.diffusion.samplers import heun_step


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(Objective):
    """Uniform cells of a Karras grid of `levels`; the lower point is the teacher's, by one Heun step; weight 1.

    mu: decay of the target's EMA; 0, as released for CIFAR-10, takes the student itself behind a stop-gradient. Both start as
    the teacher in the paper: `config.init.generator`.
    """

    levels: int = 18
    mu: float = 0.0

    needs_teacher = True

    def __post_init__(self):
        if self.levels < 2 or not 0 <= self.mu < 1:
            raise ValueError(
                f"found levels={self.levels}, mu={self.mu}, expected levels >= 2 and 0 <= mu < 1; change config.objective"
            )

    @property
    def target_decay(self):
        """The constant decay of the target network's EMA, None without one."""
        return (lambda step: jnp.float32(self.mu)) if self.mu else None

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image. i is uniform in {0..levels-2}; student at level i, target at i + 1 of a decreasing grid."""
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        draw = lambda k: jax.random.randint(k, (), 0, self.levels - 1)  # noqa: E731
        index = jax.vmap(draw)(keys[:, 0]).astype(jnp.float32)
        sigma, lower = (karras_sigma(i, self.levels, self.noise) for i in (index, index + 1))
        noisy = x0 + per_image(sigma) * self.draw(keys[:, 1], x0.shape[1:])
        teacher = lambda x, sigma_B: self.f(nets["teacher"], x, sigma_B, cond, key=None)  # noqa: E731
        reached = heun_step(teacher, noisy, sigma, lower, smallest=self.noise.sigma_min)
        behind = jax.lax.stop_gradient(reached), lower
        target = nets.get("target", nets["student"])
        return self.compared(nets["student"], target, (noisy, sigma), behind, cond, key=key), {}
