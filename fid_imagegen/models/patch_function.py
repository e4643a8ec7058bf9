"""Image functions of patches: every patch has a small MLP of its own, and neighbours fade into each other.

PixNerd (arXiv 2507.23268) is the source of the MLP: a layer of cosines, SiLU, a layer of values, all predicted. There each patch
ends at its border; here it reaches to the centres of its neighbours under a window whose shifts sum to one, so that the function
is continuous.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class PatchMLP:
    """The MLPs' sizes.

    channels: values per coordinate. rows, columns: patches. width: hidden width. bands: cosines an axis over a patch's reach of
    two pitches; 2 p of them reach the Nyquist rate of p pixels a patch.
    integrated: every cosine is averaged over the pixel's footprint, as `local_function.LocalMLP` does.
    """

    channels: int
    rows: int
    columns: int
    width: int = 32
    bands: int = 8
    integrated: bool = True
    dtype: str = "float32"

    @property
    def features(self) -> int:
        """Predicted values of a patch: two matrices and a bias."""
        return self.bands**2 * self.width + self.width * self.channels + self.channels

    def init_shared(self, key: PRNGKeyArray) -> dict[str, Array]:
        """Matrices that every patch's are added to: unit variance from layer to layer, and zero at the end."""
        first = jax.random.normal(key, (self.bands**2, self.width)) / self.bands
        return {"first": first, "second": jnp.zeros((self.width, self.channels)), "bias": jnp.zeros((self.channels,))}

    def evaluate(
        self,
        shared: dict[str, Array],
        per_image: dict[str, Array],
        coords_N2: Float[Array, "coordinates 2"],
        cell_2: Float[Array, "2"],
    ) -> Float[Array, "coordinates channels"]:
        """Values of one image, per_image {"features": [rows, columns, features]}, at `coords_N2` for pixels of `cell_2`."""
        count = jnp.asarray([self.rows, self.columns])
        place_N2 = (coords_N2 + 1) / 2 * count - 0.5  # patch i has its centre at i
        low_N2 = jnp.floor(place_N2).astype(jnp.int32)
        total, weights = 0.0, 0.0
        for offset in itertools.product((0, 1), repeat=2):
            patch_N2 = low_N2 + jnp.asarray(offset)
            away_N2 = place_N2 - patch_N2
            inside_N = jnp.all((patch_N2 >= 0) & (patch_N2 < count), axis=1)
            weight_N = jnp.prod(jnp.cos(jnp.pi / 2 * away_N2) ** 2, axis=1) * inside_N
            row_N, column_N = jnp.clip(patch_N2, 0, count - 1).T
            first, second, bias = self._matrices(shared, per_image["features"][row_N, column_N])
            waves = self._waves(away_N2, cell_2 / 2 * count)
            hidden = jax.nn.silu(self._product("nk,nkh->nh", waves, first))
            total += weight_N[:, None] * (self._product("nh,nhc->nc", hidden, second) + bias)
            weights += weight_N
        return total / weights[:, None]

    def evaluate_grid(
        self, shared: dict[str, Array], per_image: dict[str, Array], grid: tuple[int, int]
    ) -> Float[Array, "height width channels"]:
        """Values on a grid of an even number of pixels a patch: as `evaluate`, but every matrix is read once."""
        pixels = grid[0] // self.rows
        steps = (np.arange(2 * pixels) + 0.5) / pixels - 1
        away_N2 = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
        footprint = jnp.full((2,), 1 / pixels)
        first, second, bias = self._matrices(shared, per_image["features"])
        hidden = jax.nn.silu(self._product("nk,ijkh->ijnh", self._waves(jnp.asarray(away_N2), footprint), first))
        window_N = np.prod(np.cos(np.pi / 2 * away_N2) ** 2, axis=1)
        values = (self._product("ijnh,ijhc->ijnc", hidden, second) + bias[:, :, None]) * window_N[:, None]
        weights = jnp.broadcast_to(window_N[:, None], (self.rows, self.columns, len(window_N), 1))
        return self._overlapped(values, pixels) / self._overlapped(weights, pixels)

    def _overlapped(self, windows: Array, pixels: int) -> Float[Array, "height width channels"]:
        """Windows of two pitches a side, each added where it lies."""
        quarters = rearrange(windows, "i j (a p b q) c -> a b i j p q c", a=2, p=pixels, b=2, q=pixels)
        total = 0.0
        for a, b in itertools.product((0, 1), repeat=2):
            total += jnp.pad(quarters[a, b], ((a, 1 - a), (b, 1 - b), (0, 0), (0, 0), (0, 0)))
        canvas = rearrange(total, "i j p q c -> (i p) (j q) c")
        half = pixels // 2
        return canvas[half : half + self.rows * pixels, half : half + self.columns * pixels]

    def _matrices(self, shared: dict[str, Array], features: Array) -> tuple[Array, Array, Array]:
        """(first, second, bias) of each patch from its predicted features [..., features]."""
        sizes = self.bands**2 * self.width, self.width * self.channels
        first, second, bias = jnp.split(features.astype(jnp.float32), np.cumsum(sizes).tolist(), axis=-1)
        first = rearrange(first, "... (k h) -> ... k h", h=self.width) / self.bands
        second = rearrange(second, "... (h c) -> ... h c", c=self.channels) / self.width**0.5
        return shared["first"] + first, shared["second"] + second, shared["bias"] + bias

    def _waves(self, away_N2: Array, footprint_2: Array) -> Float[Array, "coordinates bands**2"]:
        """Products of cosines of the row and of the column over [-1, 1] pitches."""
        bands = np.arange(self.bands, dtype=np.float32)
        waves = jnp.cos(jnp.pi / 2 * (away_N2[:, :, None] + 1) * bands)
        if self.integrated:
            waves *= jnp.sinc(footprint_2[:, None] * bands / 4)
        return rearrange(waves[:, 0, :, None] * waves[:, 1, None, :], "n k l -> n (k l)")

    def _product(self, equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a.astype(self.dtype), b.astype(self.dtype), preferred_element_type=jnp.float32)


PATCH_PRESETS = {"patch32": {"width": 32}, "patch64": {"width": 64}}
