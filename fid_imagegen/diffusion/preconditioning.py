"""From a network's raw output to a consistency function, as a table of small pure functions of sigma.

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma)),   f(x, sigma_min) = x

`edm` is CM's parameterisation (Song et al. 2023, Sec. 3 and App. C): at large sigma F stands for x0 / sigma_data, at small
sigma for minus the noise, which a band-limited image function cannot represent. `x0_blend` puts the clean image in the
network at every level: f = c_skip x + (1 - c_skip) G; it keeps the boundary condition.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.noise import NoiseRange

Sigma = Float[Array, "..."]
Net = Callable[..., Float[Array, "batch height width channels"]]


def c_in(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """Scales a noisy image to unit variance."""
    return 1 / jnp.sqrt(sigma**2 + noise.sigma_data**2)


def c_noise(sigma: Sigma) -> Sigma:
    """The noise level as the network sees it: ln(sigma) / 4."""
    return jnp.log(sigma) / 4


def c_skip(sigma: Sigma, noise: NoiseRange) -> Sigma:
    """1 at sigma_min."""
    return noise.sigma_data**2 / ((sigma - noise.sigma_min) ** 2 + noise.sigma_data**2)


def _edm_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    return noise.sigma_data * (sigma - noise.sigma_min) / jnp.sqrt(sigma**2 + noise.sigma_data**2)


def _blend_out(sigma: Sigma, noise: NoiseRange) -> Sigma:
    # 1 - c_skip, written without the cancellation near sigma_min.
    return (sigma - noise.sigma_min) ** 2 / ((sigma - noise.sigma_min) ** 2 + noise.sigma_data**2)


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """c_out, and the factor that turns the raw output into a clean image where the input is pure noise (or clean)."""

    c_out: Callable[[Sigma, NoiseRange], Sigma]
    clean_scale: Callable[[NoiseRange], float]


PRECONDITIONINGS = {
    "edm": Preconditioning(c_out=_edm_out, clean_scale=lambda noise: noise.sigma_data),
    "x0_blend": Preconditioning(c_out=_blend_out, clean_scale=lambda noise: 1.0),
}


def preconditioning(name: str) -> Preconditioning:
    """The named preconditioning; ValueError lists the known names."""
    if name not in PRECONDITIONINGS:
        raise ValueError(f"found preconditioning {name!r}, expected one of {sorted(PRECONDITIONINGS)}")
    return PRECONDITIONINGS[name]


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
    raw = net(per_image(c_in(sigma_B, noise)) * x, c_noise(sigma_B)[:, None], cond, key=key)
    return per_image(c_skip(sigma_B, noise)) * x + per_image(form.c_out(sigma_B, noise)) * raw
