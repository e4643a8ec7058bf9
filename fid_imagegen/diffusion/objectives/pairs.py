"""What the discrete and continuous consistency objectives share: comparing f at two levels of one noisy path."""

import jax
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.distances import Distance
from fid_imagegen.diffusion.noise import NoiseRange, example_normal
from fid_imagegen.diffusion.preconditioning import Net, Preconditioning, consistency_function, per_image


def pair_distance(
    student: Net,
    target: Net,
    x0: Float[Array, "batch height width channels"],
    cond: Array | None,
    *,
    sigma_B: Float[Array, "batch"],
    lower_B: Float[Array, "batch"],
    keys: Key[Array, "batch"],
    key: Key[Array, ""],
    noise: NoiseRange,
    form: Preconditioning,
    distance: Distance,
) -> Float[Array, "batch"]:
    """d(f(x0 + sigma z, sigma), stop_gradient f-(x0 + lower z, lower)): the SAME z, dropout and jitter on both sides."""
    z = example_normal(keys, x0.shape[1:])
    common = {"key": key, "noise": noise, "form": form}
    ahead = consistency_function(student, x0 + per_image(sigma_B) * z, sigma_B, cond, **common)
    behind = consistency_function(target, x0 + per_image(lower_B) * z, lower_B, cond, **common)
    return distance(ahead, jax.lax.stop_gradient(behind))
