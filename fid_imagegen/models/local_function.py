"""Local image functions: every patch of the image says what the function is near it, one shared MLP reads it.

LIIF (arXiv 2012.09161) and INFD (arXiv 2406.07480) are the sources. The MLP sees the features of the patches around a point,
interpolated between their centres, and where in its patch the point lies: as cosines and sines of the patch's pitch, so that
the function is continuous across patches. Deviation: LIIF's MLP is given the size of a pixel as a number, of which training at
one size teaches nothing that holds at others; here it only damps the bands that a pixel cannot hold.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class LocalMLP:
    """The shared MLP and what it is given.

    channels: values per coordinate. rows, columns: patches. features: values a patch. width, depth: hidden width and number of
    linear layers. bands: frequencies 1 .. bands per patch; a patch of p pixels has its Nyquist rate at p / 2.
    integrated: every band is averaged over the pixel's footprint, as integrated positional encoding does (Mip-NeRF, arXiv
    2103.13415): a coarser render loses the bands that it cannot hold, a finer one gets them whole.
    """

    channels: int
    rows: int
    columns: int
    features: int = 64
    width: int = 128
    depth: int = 3
    bands: int = 4
    integrated: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        if self.depth < 2:
            raise ValueError(f"found an image function of depth {self.depth}, expected at least 2 linear layers")

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(fan-in, fan-out) of each linear layer."""
        widths = [self.features + 4 * self.bands, *[self.width] * (self.depth - 1), self.channels]
        return list(itertools.pairwise(widths))

    def init_shared(self, key: PRNGKeyArray) -> dict[str, Array]:
        """Kaiming-uniform (a = sqrt 5) matrices and biases, as the global function's."""
        shared = {}
        for layer, (fan_in, fan_out) in enumerate(self.layer_sizes):
            key, kernel_key, bias_key = jax.random.split(key, 3)
            bound = fan_in**-0.5
            shared[f"kernel_{layer}"] = jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound)
            shared[f"bias_{layer}"] = jax.random.uniform(bias_key, (fan_out,), minval=-bound, maxval=bound)
        return shared

    def evaluate(
        self,
        shared: dict[str, Array],
        per_image: dict[str, Array],
        coords_N2: Float[Array, "coordinates 2"],
        cell_2: Float[Array, "2"],
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image, per_image {"features": [rows, columns, features]}, at `coords_N2` for pixels of `cell_2`."""
        count = jnp.asarray([self.rows, self.columns], jnp.float32)
        place_N2 = (coords_N2 + 1) / 2 * count - 0.5  # patch i has its centre at i
        x = [self._interpolated(per_image["features"], place_N2), self._encoded(place_N2, cell_2 / 2 * count)]
        x = jnp.concatenate(x, axis=-1)
        for layer in range(self.depth):
            kernel, bias = shared[f"kernel_{layer}"], shared[f"bias_{layer}"]
            x = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32) + bias
            x = jax.nn.gelu(x) if layer < self.depth - 1 else x
        return x

    def _interpolated(self, features: Array, place_N2: Array) -> Float[Array, "coordinates features"]:
        """Bilinear between the centres of patches, constant beyond the outermost."""
        last = jnp.asarray([self.rows - 1, self.columns - 1])
        place_N2 = jnp.clip(place_N2, 0, last)
        low_N2 = jnp.floor(place_N2).astype(jnp.int32)
        high_N2, weight_N2 = jnp.minimum(low_N2 + 1, last), place_N2 - low_N2
        total = 0.0
        for row, column in itertools.product((0, 1), repeat=2):
            at = (high_N2 if row else low_N2)[:, 0], (high_N2 if column else low_N2)[:, 1]
            down = weight_N2[:, 0] if row else 1 - weight_N2[:, 0]
            across = weight_N2[:, 1] if column else 1 - weight_N2[:, 1]
            total += (down * across)[:, None] * features[at]
        return total

    def _encoded(self, place_N2: Array, footprint_2: Array) -> Float[Array, "coordinates 4*bands"]:
        bands = np.arange(1, self.bands + 1, dtype=np.float32)
        phases = 2 * jnp.pi * place_N2[:, :, None] * bands
        waves = jnp.stack([jnp.cos(phases), jnp.sin(phases)], axis=1)
        if self.integrated:
            waves *= jnp.sinc(footprint_2[:, None] * bands)
        return rearrange(waves, "n w a k -> n (w a k)")


LOCAL_PRESETS = {
    "local256": {"features": 128, "width": 256, "depth": 4},
    "local128": {"features": 64, "width": 128, "depth": 3},
    "local64": {"features": 32, "width": 64, "depth": 3},
}
