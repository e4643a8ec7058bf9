"""Rotary positions over rows and columns (Su et al. 2021, RoFormer, arXiv 2104.09864), so that any height and width will do.

A query and a key that are turned by the angles of their places have a product that depends on the difference of the places
alone. Rotations never say where in the picture: fixed positions, as DiT's, stand beside them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Rotation = Float[np.ndarray, "tokens angles"]


def rotary_angles(height: int, width: int, features: int) -> Rotation:
    """Angles [height * width, features / 2]: the first half turns with the row, the second with the column."""
    if features % 4:
        raise ValueError(f"found heads of {features} features, expected a multiple of 4; change width or heads")
    frequencies = 10000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1).astype(np.float32)


def rotate(
    x: Float[Array, "batch tokens heads features"], angles: Rotation
) -> Float[Array, "batch tokens heads features"]:
    """Turns the pairs (k, k + features / 2) of every head by the token's angles in float32 at least; returned as given."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = [first * cosine - second * sine, first * sine + second * cosine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
