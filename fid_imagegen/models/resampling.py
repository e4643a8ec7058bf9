"""Band-limited interpolation of pixels: Lanczos-3."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def resample(
    images_BHWC: Float[Array, "batch height width channels"],
    coords_N2: Float[Array, "coordinates 2"],
    cell_2: Float[Array, "2"],
) -> Float[Array, "batch coordinates channels"]:
    """Values of images at coordinates in [-1, 1], for pixels of the footprint `cell_2`."""
    rows_NH = lanczos_weights(coords_N2[:, 0], cell_2[0], images_BHWC.shape[1])
    columns_NW = lanczos_weights(coords_N2[:, 1], cell_2[1], images_BHWC.shape[2])
    return jnp.einsum("nh,bhwc,nw->bnc", rows_NH, images_BHWC, columns_NW, precision="highest")


def lanczos_weights(
    coords_N: Float[Array, "coordinates"], cell: Float[Array, ""], size: int
) -> Float[Array, "coordinates size"]:
    """Weights of `size` samples at each coordinate: Lanczos-3, widened where a pixel's footprint exceeds a sample.

    Exactly one-hot at the samples themselves, so that a render on the native grid repeats the samples bit for bit.
    """
    stretch = jnp.maximum(1.0, cell * size / 2)
    offsets = ((coords_N[:, None] + 1) * size - 1) / 2 - jnp.arange(size, dtype=jnp.float32)
    nearest = jnp.round(offsets)
    # Coordinates are float32: a sample's own offset is an integer within 1e-7 size. Snapping from farther away would show.
    on_sample = (jnp.abs(offsets - nearest) < 1e-6 * size) & (stretch <= 1.0 + 1e-6)
    x = offsets / stretch
    kernel = jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0.0)
    kernel = jnp.where(on_sample, (nearest == 0).astype(jnp.float32), kernel)
    return kernel / jnp.sum(kernel, axis=1, keepdims=True)
