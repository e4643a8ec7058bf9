"""Image functions: functions of coordinates that differ from image to image.

A set of image functions is `(kind, shared, per_image, native)`. `kind.evaluate(shared, per_image, coords, cell)` gives ONE
image's values at coordinates; everything here vmaps it over the images, so that the Fourier features of a grid are
computed once and not once per image.

Coordinates are (row, column) in [-1, 1] at pixel centres: pixel i of N sits at (2 i + 1 - N) / N. They are made from integer
pixel indices in float64, rounded once to float32 and stay float32: at the papers' cut-off of 1024 a phase reaches
3,217 rad, which half precision cannot hold. ANR (arXiv 2407.15355) is the source of variational coordinates.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.patch_function import PatchMLP
from fid_imagegen.models.pixel_function import PixelMLP
from fid_imagegen.models.resampling import resample


def axis_coordinates(size: int, *, full: float | None = None, offset: float = 0.0) -> np.ndarray:
    """Float64 coordinates of `size` pixels that start `offset` pixels into an axis of `full` pixels (default: all of it)."""
    full = size if full is None else full
    return (2 * (np.arange(size) + offset) + 1 - full) / full


def pixel_grid(height: int, width: int) -> np.ndarray:
    """Pixel centres of a whole image, float32 [height * width, 2], row-major, (row, column)."""
    rows, columns = np.meshgrid(axis_coordinates(height), axis_coordinates(width), indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1).astype(np.float32)


def pixel_cell(height: float, width: float) -> np.ndarray:
    """Footprint of one pixel of a `height` x `width` image in coordinate units, float32 [2]."""
    return np.asarray([2 / height, 2 / width], dtype=np.float32)


def variational_coordinates(
    coords_N2: Float[Array, "coordinates 2"], key: PRNGKeyArray, *, size: int
) -> Float[Array, "coordinates 2"]:
    """Coordinates jittered for training (ANR's variational coordinates), for a grid of `size` pixels on its longer side.

    Gaussian of deviation 0.3 / size, clipped to +-0.5 / size as in ANR's code. A pixel is 2 / size wide, so the clip is half
    of the half-pixel, a quarter of the pitch.
    """
    noise = jnp.clip(0.3 * jax.random.normal(key, coords_N2.shape), -0.5, 0.5)
    return coords_N2 + noise / size


@dataclasses.dataclass(frozen=True)
class PixelGrid:
    """What a generator of one fixed size makes, as a function: its pixels, interpolated by Lanczos-3. Nothing is shared."""

    channels: int

    def evaluate(
        self,
        shared: dict,
        per_image: dict[str, Array],
        coords_N2: Float[Array, "coordinates 2"],
        cell_2: Float[Array, "2"],
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image, per_image {"pixels": [height, width, channels]}, at `coords_N2` for pixels of `cell_2`."""
        del shared
        return resample(per_image["pixels"][None], coords_N2, cell_2)[0]

    def evaluate_grid(
        self, shared: dict, per_image: dict[str, Array], grid: tuple[int, int]
    ) -> Float[Array, "height width channels"]:
        """The pixels themselves."""
        del shared, grid
        return per_image["pixels"]


@dataclasses.dataclass(frozen=True)
class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) of two functions: null + scale (labelled - null)."""

    kind: CoordinateMLP | LocalMLP | PatchMLP | PixelMLP | PixelGrid

    @property
    def channels(self) -> int:
        """Values per coordinate."""
        return self.kind.channels

    def evaluate(
        self, shared: dict, per_image: dict, coords_N2: Float[Array, "coordinates 2"], cell_2: Float[Array, "2"]
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image, per_image {"labelled", "null": what `kind` has, "scale": []}."""
        labelled, null = (
            self.kind.evaluate(shared, per_image[name], coords_N2, cell_2) for name in ("labelled", "null")
        )
        return null + per_image["scale"] * (labelled - null)


@flax.struct.dataclass
class NativeTerm:
    """What a consistency model adds to its network's function: image = skip * x_t + out * values.

    noisy: x_t on the native grid [batch, height, width, channels]. skip, out: [batch].
    """

    noisy: Array
    skip: Array
    out: Array


@flax.struct.dataclass
class ImageFunctions:
    """A batch of image functions. `grid` is the (height, width) they were trained at."""

    kind: CoordinateMLP | LocalMLP | PatchMLP | PixelMLP | PixelGrid | Guided = flax.struct.field(pytree_node=False)
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    shared: Any = None
    per_image: Any = None
    native: NativeTerm | None = None

    def __len__(self) -> int:
        return jax.tree.leaves(self.per_image)[0].shape[0]

    def __getitem__(self, images: slice) -> "ImageFunctions":
        """The functions of a slice of the batch. TypeError for a single number, which would drop the batch axis."""
        if not isinstance(images, slice):
            raise TypeError(f"found index {images!r}, expected a slice of the batch, such as functions[3:4]")
        pick = lambda tree: jax.tree.map(lambda x: x[images], tree)  # noqa: E731
        return self.replace(per_image=pick(self.per_image), native=pick(self.native))


def evaluate(
    functions: ImageFunctions, coords_N2: Float[Array, "coordinates 2"], cell_2: Float[Array, "2"]
) -> Float[Array, "batch coordinates channels"]:
    """Values of every function at the coordinates, the native term included (x_t resampled band-limited)."""
    one = lambda per_image: functions.kind.evaluate(functions.shared, per_image, coords_N2, cell_2)  # noqa: E731
    values_BNC = jax.vmap(one)(functions.per_image)
    if functions.native is None:
        return values_BNC
    skip, out = functions.native.skip[:, None, None], functions.native.out[:, None, None]
    return skip * resample(functions.native.noisy, coords_N2, cell_2) + out * values_BNC


def evaluate_rematerialised(
    functions: ImageFunctions, coords_N2: Float[Array, "coordinates 2"], cell_2: Float[Array, "2"], *, chunk: int
) -> Float[Array, "batch coordinates channels"]:
    """`evaluate` for training at large sizes: chunks of coordinates, recomputed in the backward pass."""
    count = coords_N2.shape[0]
    if count <= chunk:
        return evaluate(functions, coords_N2, cell_2)
    padded = jnp.pad(coords_N2, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, 2)
    step = jax.checkpoint(lambda coords: evaluate(functions, coords, cell_2), prevent_cse=False)
    values_KBNC = jax.lax.map(step, padded)
    values = jnp.moveaxis(values_KBNC, 0, 1)
    return values.reshape(values.shape[0], -1, values.shape[-1])[:, :count]
