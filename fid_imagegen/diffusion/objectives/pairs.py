"""What the discrete consistency objectives share: comparing f at two levels of one noisy path."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.distances import Distance
from fid_imagegen.diffusion.noise import NoiseRange, example_normal
from fid_imagegen.diffusion.preconditioning import Net, Preconditioning, consistency_function, per_image

Images = Float[Array, "batch height width channels"]


def pair_distance(
    student: Net,
    target: Net,
    x0: Images,
    cond: Array | None,
    *,
    sigma_B: Float[Array, "batch"],
    lower_B: Float[Array, "batch"],
    keys: Key[Array, "batch"],
    key: Key[Array, ""],
    noise: NoiseRange,
    form: Preconditioning,
    distance: Distance,
    draw: Callable = example_normal,
) -> Float[Array, "batch"]:
    """`two_level_distance` of x0 + sigma z and x0 + lower z, the SAME z: Euler's step with the true x0."""
    z = draw(keys, x0.shape[1:])
    noisy, lower = (x0 + per_image(level_B) * z for level_B in (sigma_B, lower_B))
    common = {"key": key, "noise": noise, "form": form, "distance": distance}
    return two_level_distance(student, target, (noisy, sigma_B), (lower, lower_B), cond, **common)


def two_level_distance(
    student: Net,
    target: Net,
    ahead: tuple[Images, Float[Array, "batch"]],
    behind: tuple[Images, Float[Array, "batch"]],
    cond: Array | None,
    *,
    key: Key[Array, ""],
    noise: NoiseRange,
    form: Preconditioning,
    distance: Distance,
) -> Float[Array, "batch"]:
    """d(f(ahead), stop_gradient f-(behind)), each an (image, level): the SAME dropout and jitter on both sides."""
    common = {"key": key, "noise": noise, "form": form}
    found = consistency_function(student, *ahead, cond, **common)
    wanted = consistency_function(target, *behind, cond, **common)
    return distance(found, jax.lax.stop_gradient(wanted))
