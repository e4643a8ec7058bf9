"""Global image functions: coordinate MLPs on Fourier features whose weights a generator predicts.

Sources: TransINR (arXiv 2208.02801: the function, `normalize`), LDMI (arXiv 2504.16580: `scale`), SIREN (arXiv 2006.09661).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

PAPER_CUTOFF = 1024.0


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
        if min(self.width, self.bands, self.groups) < 1 or not 0 < self.cutoff < math.inf:
            raise ValueError(
                f"found width {self.width}, bands {self.bands}, groups {self.groups}, cutoff {self.cutoff}, expected "
                "positive ones; change the function's fields in config.model"
            )
        for _, fan_out in self.layer_sizes:
            if self.weight_update != "low_rank" and fan_out % min(self.groups, fan_out):
                raise ValueError(
                    f"found {self.groups} groups for {fan_out} columns, expected a divisor; change config.model.groups"
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


FUNCTION_PRESETS = {
    "5x256": {"width": 256, "depth": 5, "bands": 64, "groups": 64},  # faithful: TransINR's size
    "5x128": {"width": 128, "depth": 5, "bands": 64, "groups": 64},
    "5x64": {"width": 64, "depth": 5, "bands": 32, "groups": 32},
}
