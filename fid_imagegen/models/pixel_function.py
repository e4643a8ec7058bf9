"""Image functions of pixels: a feature vector at every pixel of the training grid, and one shared MLP that reads them anywhere.

Between pixels features are interpolated by Catmull-Rom cubics, which have no kinks and pass through every pixel's own. So on the
training grid the function is what a generator of one fixed size makes, each pixel read by the MLP (INFD, arXiv 2406.07480, has
features as fine); elsewhere the MLP decides what lies between, where interpolated colours could only blur.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class PixelMLP:
    """The shared MLP and what it is given.

    channels: values per coordinate. rows, columns: patches. patch: pixels a side of one. values: features a pixel, of which the
    first `channels` are colours that the MLP's output is added to. width: of the one hidden layer.
    """

    channels: int
    rows: int
    columns: int
    patch: int
    values: int = 16
    width: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        if self.values < self.channels:
            raise ValueError(
                f"found {self.values} features a pixel, expected at least the {self.channels} channels; take another "
                "preset for config.model.function"
            )

    @property
    def features(self) -> int:
        """Predicted values of a patch."""
        return self.patch**2 * self.values

    def init_shared(self, key: PRNGKeyArray) -> dict[str, Array]:
        """An MLP that adds nothing yet: the fresh function is its interpolated colours."""
        first = jax.random.normal(key, (self.values, self.width)) / self.values**0.5
        bias = {"bias_0": jnp.zeros(self.width), "bias_1": jnp.zeros(self.channels)}
        return bias | {"kernel_0": first, "kernel_1": jnp.zeros((self.width, self.channels))}

    def evaluate(
        self,
        shared: dict[str, Array],
        per_image: dict[str, Array],
        coords_N2: Float[Array, "coordinates 2"],
        cell_2: Float[Array, "2"],
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image, per_image {"features": [rows, columns, features]}, at `coords_N2`; of any footprint the same."""
        del cell_2  # renders coarser than the training grid are averaged over it
        return self._read(shared, _interpolated(self._pixels(per_image), coords_N2))

    def evaluate_grid(
        self, shared: dict[str, Array], per_image: dict[str, Array], grid: tuple[int, int]
    ) -> Float[Array, "height width channels"]:
        """Values on the training grid: nothing lies between."""
        del grid
        return self._read(shared, self._pixels(per_image))

    def _pixels(self, per_image: dict[str, Array]) -> Float[Array, "height width values"]:
        return rearrange(per_image["features"], "i j (p q v) -> (i p) (j q) v", p=self.patch, q=self.patch)

    def _read(self, shared: dict[str, Array], x: Float[Array, "*places values"]) -> Float[Array, "*places channels"]:
        hidden = jax.nn.gelu(self._product(x, shared["kernel_0"]) + shared["bias_0"])
        return x[..., : self.channels] + self._product(hidden, shared["kernel_1"]) + shared["bias_1"]

    def _product(self, x: Array, kernel: Array) -> Array:
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)


def _interpolated(x_HWV: Float[Array, "height width values"], coords_N2) -> Float[Array, "coordinates values"]:
    """Catmull-Rom between pixels, the outermost repeated beyond the border."""
    size = jnp.asarray(x_HWV.shape[:2])
    place_N2 = (coords_N2 + 1) / 2 * size - 0.5  # pixel i has its centre at i
    low_N2 = jnp.floor(place_N2)
    weights_4N2 = _catmull_rom(place_N2 - low_N2)
    total = 0.0
    for row, column in itertools.product(range(4), repeat=2):
        at_N2 = jnp.clip(low_N2.astype(jnp.int32) + jnp.asarray([row - 1, column - 1]), 0, size - 1)
        total += (weights_4N2[row][:, 0] * weights_4N2[column][:, 1])[:, None] * x_HWV[at_N2[:, 0], at_N2[:, 1]]
    return total


def _catmull_rom(t: Array) -> tuple[Array, Array, Array, Array]:
    """Weights of the samples at -1, 0, 1, 2 for a point at t in [0, 1): they sum to one, and at t = 0 only the second counts."""
    return (
        0.5 * t * (-1 + t * (2 - t)),
        1 + 0.5 * t * t * (3 * t - 5),
        0.5 * t * (1 + t * (4 - 3 * t)),
        0.5 * t * t * (t - 1),
    )


PIXEL_PRESETS = {
    "pixel128": {"values": 32, "width": 128},
    "pixel64": {"values": 32, "width": 64},
    "pixel32": {"values": 16, "width": 32},
}
