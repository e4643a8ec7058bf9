"""PyTorch's bicubic resize with antialias=True and align_corners=True, as one constant matrix an axis."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Weights [new_size, size] in float64, rows sum to one.

    With antialiasing `align_corners` does not align corners: it sets the scale to (size - 1) / (new_size - 1), while samples
    are still taken at scale * (i + 0.5). The public Stage B was trained so. Equal sizes give the identity.
    """
    scale = (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    stretch = max(scale, 1.0)
    matrix = np.zeros((new_size, size))
    for row, centre in enumerate(scale * (np.arange(new_size) + 0.5)):
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), size)
        weights = keys_cubic((np.arange(first, last) + 0.5 - centre) / stretch)
        matrix[row, first:last] = weights / weights.sum()
    return matrix


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5, zero from |x| = 2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize(
    x_BHWC: Float[Array, "batch height width channels"], height: int, width: int
) -> Float[Array, "batch new_height new_width channels"]:
    """Resizes in float32 or better: values of the compressor's latents may be far from one."""
    x_BHWC = x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))
    rows = jnp.asarray(bicubic_matrix(x_BHWC.shape[1], height), x_BHWC.dtype)
    columns = jnp.asarray(bicubic_matrix(x_BHWC.shape[2], width), x_BHWC.dtype)
    return jnp.einsum("yh,bhwc,xw->byxc", rows, x_BHWC, columns, precision="highest")
