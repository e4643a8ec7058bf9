"""Consistency training exactly as Song et al. 2023 (arXiv 2303.01469, Alg. 3; constants of the released CIFAR-10 code)."""

import dataclasses

import jax
import jax.numpy as jnp

from fid_imagegen.diffusion.noise import check_levels, ct_levels, ct_target_decay, karras_sigma
from fid_imagegen.diffusion.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """Uniform cells of a Karras grid of N(k) levels; the target is an EMA of the student with decay mu(k); weight 1."""

    s0: int = 2
    s1: int = 150
    mu0: float = 0.9

    def __post_init__(self):
        check_levels(self.s0, self.s1, least=2)  # N(0) is s0, and a pair takes two
        if not 0 < self.mu0 < 1:
            raise ValueError(f"found mu0={self.mu0}, expected 0 < mu0 < 1; change config.objective")

    def target_decay(self, step):
        """mu(k), the decay of the target network's EMA at step k."""
        return ct_target_decay(step, self.num_steps, self.s0, self.s1, self.mu0)

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image. i is uniform in {0..N-2}; student at level i, target at i + 1 of a decreasing grid."""
        count = ct_levels(step, self.num_steps, self.s0, self.s1)
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        index = jax.vmap(lambda k: jax.random.randint(k, (), 0, count - 1))(keys[:, 0]).astype(jnp.float32)
        levels = (karras_sigma(i, count, self.noise) for i in (index, index + 1))
        loss = self.pair_distance(nets["student"], nets["target"], x0, cond, *levels, keys=keys[:, 1], key=key)
        return loss, {"levels": count.astype(jnp.float32), "target_decay": self.target_decay(step)}
