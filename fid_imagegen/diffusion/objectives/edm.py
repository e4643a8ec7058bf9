"""Plain diffusion (Karras et al. 2022, arXiv 2206.00364): teacher and start of the consistency objectives, and their rival."""

import dataclasses

import jax

from fid_imagegen.diffusion.distances import l2
from fid_imagegen.diffusion.noise import lognormal_sigmas
from fid_imagegen.diffusion.objectives.objective import Objective
from fid_imagegen.diffusion.preconditioning import per_image


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
    """Denoising at lognormal levels, weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM eq. 2 and Table 1).

    Its distance is the square by its mathematics: the minimiser is the mean of all clean images, which is what samplers need.
    Deviation: f has CM's boundary, c_skip(sigma_min) = 1, so that consistency objectives go on from it without a jump.
    """

    log_mean: float = -1.2
    log_deviation: float = 1.2

    any_distance = False
    sampler = "heun"
    sampling_steps = 18

    def __call__(self, nets, x0, cond, *, keys, key, step):
        """Loss per image."""
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        sigma = lognormal_sigmas(keys[:, 0], self.log_mean, self.log_deviation, self.noise)
        noisy = x0 + per_image(sigma) * self.draw(keys[:, 1], x0.shape[1:])
        found = self.f(nets["student"], noisy, sigma, cond, key=key)
        data = self.noise.sigma_data
        return (sigma**2 + data**2) / (sigma * data) ** 2 * l2(found, x0), {}
