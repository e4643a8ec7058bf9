"""Image functions: coordinate MLPs whose weights differ from image to image.

A set of image functions is `(kind, shared, per_image, native)`. `kind.evaluate(shared, per_image, coords, cell)` gives ONE
image's values at coordinates; everything here vmaps it over the images, so that the Fourier features of a grid are
computed once and not once per image.

Coordinates are (row, column) in [-1, 1] at pixel centres: pixel i of N sits at (2 i + 1 - N) / N. They are made from integer
pixel indices in float64, rounded once to float32 and stay float32: at the papers' cut-off of 1024 a phase reaches
3,217 rad, which half precision cannot hold.

Sources: TransINR (arXiv 2208.02801: the function, `normalize`), LDMI (arXiv 2504.16580: `scale`), SIREN (arXiv 2006.09661),
ANR (arXiv 2407.15355: variational coordinates).
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.resampling import resample

PAPER_CUTOFF = 1024.0


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


def fourier_features(
    coords_N2: Float[Array, "coordinates 2"], frequencies: np.ndarray, cell_2: Float[Array, "2"] | None = None
) -> Float[Array, "coordinates features"]:
    """[cos(pi w x), sin(pi w x)] of both coordinates for every frequency w (cycles per image): 4 features a frequency.

    With `cell_2`, the footprint of a pixel, every wave is its average over the footprint: sinc(w cell / 2) times itself.
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    phases = jnp.pi * coords_N2.astype(jnp.float32)[:, :, None] * frequencies
    phases = phases.reshape(coords_N2.shape[0], -1)
    waves = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=1)
    if cell_2 is None:
        return waves
    return waves * jnp.tile(jnp.sinc(cell_2[:, None] / 2 * frequencies).reshape(-1), 2)


@dataclasses.dataclass(frozen=True)
class CoordinateMLP:
    """The plain MLP of one image. Its matrices are shared base matrices, updated per image by predicted columns.

    channels: values per coordinate. width, depth: hidden width and number of linear layers (5x256 is TransINR's).
    activation: "relu" on Fourier features, or "sine" (SIREN) on raw coordinates, whose first-layer frequency is `omega`.
    bands, cutoff: log-spaced frequencies from 1 to `cutoff` cycles per image; the training grid's Nyquist rate is N / 2.
    groups: predicted columns per layer, at most; column j of a matrix uses prediction j mod groups.
    weight_update: "normalize" (base * prediction, columns scaled to unit norm over fan-in), "scale" (base * (1 + prediction)), or
        "low_rank" (base * (1 + tanh(prediction @ shared))), rank `groups`: predicted as in IPC (arXiv 2211.13223), squashed as in
        INR-GAN (arXiv 2011.12026), whose products of two predictions were unstable.
    integrated: Fourier features are averaged over the pixel's footprint (Mip-NeRF, arXiv 2103.13415), which a render finer than
        the training grid damps less and a coarser one more.
    """

    channels: int
    width: int = 256
    depth: int = 5
    activation: str = "relu"
    bands: int = 64
    cutoff: float = PAPER_CUTOFF
    omega: float = 30.0
    groups: int = 64
    weight_update: str = "normalize"
    integrated: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for field, known in (("activation", ("relu", "sine")), ("weight_update", ("low_rank", "normalize", "scale"))):
            if getattr(self, field) not in known:
                raise ValueError(f"found {field}={getattr(self, field)!r}, expected one of {known}")
        if self.integrated and self.activation == "sine":
            raise ValueError(
                "found integrated=True with activation 'sine', expected 'relu': raw coordinates have no bands to average"
            )
        if self.depth < 2:
            raise ValueError(f"found an image function of depth {self.depth}, expected at least 2 linear layers")
        for _, fan_out in self.layer_sizes:
            if self.weight_update != "low_rank" and fan_out % min(self.groups, fan_out):
                raise ValueError(
                    f"found {self.groups} groups for {fan_out} columns, expected a divisor; change function.groups"
                )

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(fan-in, fan-out) of each linear layer."""
        inputs = 2 if self.activation == "sine" else 4 * self.bands
        widths = [inputs, *[self.width] * (self.depth - 1), self.channels]
        return list(zip(widths[:-1], widths[1:], strict=True))

    @property
    def columns(self) -> list[int]:
        """Predicted columns of each layer: one weight token each."""
        return [min(self.groups, fan_out) for _, fan_out in self.layer_sizes]

    @property
    def frequencies(self) -> np.ndarray:
        """Log-spaced frequencies, float64 [bands], in cycles per image."""
        return np.exp(np.linspace(0.0, math.log(max(self.cutoff, 1.0)), self.bands))

    def init_shared(self, key: PRNGKeyArray) -> dict[str, Array]:
        """Base matrices and biases: Kaiming-uniform(a = sqrt 5) with ReLU, SIREN's with sine; the output gain is 1."""
        shared = {"gain": jnp.ones((self.channels,))}
        for layer, (fan_in, fan_out) in enumerate(self.layer_sizes):
            key, kernel_key, bias_key = jax.random.split(key, 3)
            bound = 1 / math.sqrt(fan_in)
            if self.activation == "sine":
                bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / self.omega
            shared[f"kernel_{layer}"] = jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound)
            if self.weight_update == "low_rank":
                rank = self.columns[layer]
                factor = jax.random.normal(jax.random.fold_in(kernel_key, 1), (rank, fan_out))
                shared[f"factor_{layer}"] = factor / math.sqrt(rank)
            bias_bound = 0.0 if self.activation == "sine" else bound
            shared[f"bias_{layer}"] = jax.random.uniform(bias_key, (fan_out,), minval=-bias_bound, maxval=bias_bound)
        return shared

    def matrix(
        self, shared: dict[str, Array], per_image: dict[str, Array], layer: int
    ) -> Float[Array, "fan_in fan_out"]:
        """The layer's matrix for one image, from the base matrix and the predicted columns [fan_in, groups]."""
        base, predicted = shared[f"kernel_{layer}"], per_image[f"columns_{layer}"].astype(jnp.float32)
        if self.weight_update == "low_rank":
            return base * (1 + jnp.tanh(predicted @ shared[f"factor_{layer}"]))
        predicted = jnp.tile(predicted, (1, base.shape[1] // predicted.shape[1]))
        if self.weight_update == "scale":
            return base * (1 + predicted)
        product = base * predicted
        return product * jax.lax.rsqrt(jnp.sum(product**2, axis=0, keepdims=True) + 1e-12)

    def evaluate(
        self,
        shared: dict[str, Array],
        per_image: dict[str, Array],
        coords_N2: Float[Array, "coordinates 2"],
        cell_2: Float[Array, "2"],
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image at `coords_N2`. `cell_2` is the footprint of a pixel, of use where features are integrated."""
        sine = self.activation == "sine"
        footprint = cell_2 if self.integrated else None
        x = coords_N2 if sine else fourier_features(coords_N2, self.frequencies, footprint)
        for layer in range(self.depth):
            matrix, bias = self.matrix(shared, per_image, layer), shared[f"bias_{layer}"]
            # Sine phases stay float32 in the first layer: `omega` times a coordinate is a phase like any other.
            dtype = jnp.float32 if sine and layer == 0 else self.dtype
            # The default precision of accelerators would round them on the way into the matrix unit.
            precision = "highest" if sine and layer == 0 else None
            x = jnp.matmul(
                x.astype(dtype), matrix.astype(dtype), precision=precision, preferred_element_type=jnp.float32
            )
            x = x + bias
            if layer < self.depth - 1:
                x = jnp.sin(self.omega * x) if sine else jax.nn.relu(x)
        return x * shared["gain"]


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


@dataclasses.dataclass(frozen=True)
class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) of two functions: null + scale (labelled - null)."""

    kind: CoordinateMLP | LocalMLP | PixelGrid

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


FUNCTION_PRESETS = {
    "5x256": {"width": 256, "depth": 5, "bands": 64, "groups": 64},  # faithful: TransINR's size
    "5x128": {"width": 128, "depth": 5, "bands": 64, "groups": 64},
    "5x64": {"width": 64, "depth": 5, "bands": 32, "groups": 32},
}


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

    kind: CoordinateMLP | LocalMLP | PixelGrid | Guided = flax.struct.field(pytree_node=False)
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
