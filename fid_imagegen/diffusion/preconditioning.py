"""From a network's raw output to a consistency function, as a table of small pure functions of sigma.

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, levels(sigma))

f takes a noisy image x = x0 + sigma z to a clean one in one jump, whichever objective taught it to.

`edm` is CM's parameterisation (Song et al. 2023, Sec. 3 and App. C): at large sigma F stands for x0 / sigma_data, at small
sigma for minus the noise. What of that a band-limited image function cannot draw stays in f, c_skip sigma z at the most; all it
can then answer is the clean image, at a scale that runs from 0 to 1 / sigma_data. In `x0_blend`, f = c_skip x + (1 - c_skip) G,
that scale is 1 at every level, and levels near sigma_min hardly count: c_out falls with the square of sigma. Of both
f(x, sigma_min) = x. `mean_flow` is pixel MeanFlow's (Lu et al. 2026, arXiv 2601.22158): on z = (1 - t) x0 + t z',
t = sigma / (1 + sigma), the network's clean image G gives the mean velocity u = (z - G) / max(t, 0.05), and the jump to t = 0 is
f = z - t u.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.noise import NoiseRange

Sigma = Float[Array, "..."]
Levels = Float[Array, "... K"]
Images = Float[Array, "batch height width channels"]
Net = Callable[..., Images]
SMALLEST_TIME = 0.05  # below it MeanFlow's velocity no longer grows with what its clean image is wrong by


def c_in(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """Scales a noisy image to unit variance."""
    return 1 / jnp.sqrt(sigma**2 + noise.sigma_data**2)


def c_noise(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """The noise level as EDM's networks see it: ln(sigma) / 4."""
    del noise
    return jnp.log(sigma) / 4


def angle(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """TrigFlow's time arctan(sigma / sigma_data), in (0, pi / 2) (Lu & Song 2025, arXiv 2410.11081)."""
    return jnp.arctan(sigma / noise.sigma_data)


def flow_time(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """t of z = (1 - t) x0 + t z': sigma / (1 + sigma)."""
    del noise
    return sigma / (1 + sigma)


def c_skip(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """1 at sigma_min."""
    return noise.sigma_data**2 / ((sigma - noise.sigma_min) ** 2 + noise.sigma_data**2)


def _edm_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return noise.sigma_data * (sigma - noise.sigma_min) / jnp.sqrt(sigma**2 + noise.sigma_data**2)


def _blend_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    # 1 - c_skip, written without the cancellation near sigma_min.
    return (sigma - noise.sigma_min) ** 2 / ((sigma - noise.sigma_min) ** 2 + noise.sigma_data**2)


def _circle_skip(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return noise.sigma_data**2 / (sigma**2 + noise.sigma_data**2)


def _circle_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return noise.sigma_data * sigma / jnp.sqrt(sigma**2 + noise.sigma_data**2)


def _flow_in(sigma: Sigma, noise: NoiseRange) -> Sigma:
    del noise
    return 1 / (1 + sigma)


def _flow_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return jnp.minimum(flow_time(sigma, noise) / SMALLEST_TIME, 1)


def _flow_skip(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return (1 - _flow_out(sigma, noise)) * _flow_in(sigma, noise)


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """The functions of sigma, and the factor that makes a clean image of the raw output where the input is pure noise (or clean).

    times: what the network is told of the level, K values. Objectives that differentiate in the level need `angle`.
    """

    c_skip: Callable[[Sigma, NoiseRange], Sigma]
    c_out: Callable[[Sigma, NoiseRange], Sigma]
    clean_scale: Callable[[NoiseRange], float]
    c_in: Callable[[Sigma, NoiseRange], Sigma] = c_in
    times: tuple[Callable[[Sigma, NoiseRange], Sigma], ...] = (c_noise,)

    def levels(self, sigma: Sigma, noise: NoiseRange) -> Levels:
        """[..., K]."""
        return jnp.stack([time(sigma, noise) for time in self.times], axis=-1)


PRECONDITIONINGS = {
    "edm": Preconditioning(c_skip, _edm_out, clean_scale=lambda noise: noise.sigma_data),
    "x0_blend": Preconditioning(c_skip, _blend_out, clean_scale=lambda noise: 1.0),
    # Its network is told t and t - r, the length of the jump: to r = 0 both are t.
    "mean_flow": Preconditioning(_flow_skip, _flow_out, lambda noise: 1.0, c_in=_flow_in, times=(flow_time, flow_time)),
}
# F is minus the velocity of a diffusion model on the cosine path, f = cos u x_u + sin u F: `edm` whose boundary is sigma = 0. Not
# in the table, for images want f(x, sigma_min) = x.
TRIGFLOW = Preconditioning(_circle_skip, _circle_out, clean_scale=lambda noise: noise.sigma_data, times=(angle,))
TIMES = {"log": c_noise, "angle": angle}


def preconditioning(name: str, time: str = "log") -> Preconditioning:
    """The named preconditioning, its network told the level as `time` says: ValueError lists the known names.

    `mean_flow` tells times of its own.
    """
    for what, found, known in (("preconditioning", name, PRECONDITIONINGS), ("time", time, TIMES)):
        if found not in known:
            raise ValueError(f"found {what} {found!r}, expected one of {sorted(known)}; change config.{what}")
    form = PRECONDITIONINGS[name]
    return form if name == "mean_flow" else dataclasses.replace(form, times=(TIMES[time],))


def per_image(value_B: Float[Array, "batch"]) -> Float[Array, "batch 1 1 1"]:
    """[batch] -> [batch, 1, 1, 1], to scale images."""
    return value_B[:, None, None, None]


def consistency_function(
    net: Net,
    x: Float[Array, "batch height width channels"],
    sigma_B: Float[Array, "batch"],
    cond: Array | None,
    *,
    key: Key[Array, ""],
    noise: NoiseRange,
    form: Preconditioning,
) -> Float[Array, "batch height width channels"]:
    """f(x, sigma) in image units. `net(x, levels_BK, cond, key=)` gives the raw output on x's grid."""
    raw = net(per_image(form.c_in(sigma_B, noise)) * x, form.levels(sigma_B, noise), cond, key=key)
    return per_image(form.c_skip(sigma_B, noise)) * x + per_image(form.c_out(sigma_B, noise)) * raw


def mean_velocity(
    net: Net,
    z: Images,
    t_B: Float[Array, "batch"],
    r_B: Float[Array, "batch"],
    cond: Array | None,
    *,
    key: Key[Array, ""] | None,
) -> Images:
    """MeanFlow's u(z_t, r, t) = (z - G) / max(t, 0.05) over [r, t], G the clean image of a network that is told t and t - r."""
    clean = net(z, jnp.stack([t_B, t_B - r_B], axis=-1), cond, key=key)
    return (z - clean) / per_image(jnp.maximum(t_B, SMALLEST_TIME))


def flow_map(
    net: Net,
    x: Images,
    sigma_B: Float[Array, "batch"],
    lower_B: Float[Array, "batch"],
    cond: Array | None,
    *,
    key: Key[Array, ""] | None,
    noise: NoiseRange,
    form: Preconditioning,
) -> Images:
    """Where the path through a noisy image x is at a lower level: z_r = z_t - (t - r) u(z_t, r, t); f is that of level 0.

    ValueError for a network that is not told both ends.
    """
    if form != PRECONDITIONINGS["mean_flow"]:
        raise ValueError(
            "found a network that is told one level, expected one of form 'mean_flow', told both ends of a jump; sample by "
            "'consistency', or train with config.preconditioning='mean_flow'"
        )
    t_B, r_B = (flow_time(level_B, noise) for level_B in (sigma_B, lower_B))
    z = per_image(form.c_in(sigma_B, noise)) * x
    z = z - per_image(t_B - r_B) * mean_velocity(net, z, t_B, r_B, cond, key=key)
    return z / per_image(form.c_in(lower_B, noise))
