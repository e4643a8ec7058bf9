"""Supervision of a function where its network sees nothing: noise on one grid, targets at another size (INFD, arXiv 2406.07480).

The network is given the image and its noise on a grid of `config.grid` pixels; the function that it makes is held to the image
there and, in a window of `config.window` pixels, at a size drawn for every batch, the image's own at most. Both are one list of
pixels, which objectives take for an image of one column: the noise of the window is that of the grid, interpolated band-limited,
so that both stand on one path.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.diffusion.noise import example_normal
from fid_imagegen.models.image_function import ImageFunctions, evaluate_rematerialised
from fid_imagegen.models.resampling import resample
from fid_imagegen.tasks.generator import image_functions, render_native

Pixels = Float[Array, "batch pixels 1 channels"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """One batch's window: `grid` of the network, `size` of the target, `window` and its corner in pixels of the target."""

    grid: int
    window: int
    size: Int[Array, ""]
    corner_2: Int[Array, "2"]

    @property
    def cell(self) -> Float[Array, "2"]:
        """Footprint of a pixel of the target."""
        return jnp.full(2, 2 / self.size, jnp.float32)

    @property
    def coordinates(self) -> Float[Array, "pixels 2"]:
        """Of the window's pixels, in [-1, 1] of the whole image."""
        row, column = jnp.meshgrid(jnp.arange(self.window), jnp.arange(self.window), indexing="ij")
        places = jnp.stack([row.ravel(), column.ravel()], axis=1) + self.corner_2
        return (2 * places.astype(jnp.float32) + 1 - self.size) / self.size

    def clean(self, images: Float[Array, "batch height width channels"]) -> Pixels:
        """An image on the grid, shrunk or enlarged by the resize that data are read with, and in the window of the target."""
        batch, side, _, channels = images.shape
        shape, scale = (batch, self.window, self.window, channels), jnp.full(2, self.size / side, jnp.float32)
        shift = -self.corner_2.astype(jnp.float32)
        inside = jax.image.scale_and_translate(images, shape, (1, 2), scale, shift, "cubic", antialias=True)
        return self._joined(on_grid(images, self.grid), inside)

    def noise(self, keys: Key[Array, "batch"], shape: tuple[int, int, int]) -> Pixels:
        """Noise of the grid, and what it is in the window: what an objective draws for pixels of `shape`."""
        z = example_normal(keys, (self.grid, self.grid, shape[-1]))
        return self._joined(z, resample(z, self.coordinates, self.cell))

    def net(self, model, params, *, training: bool, chunk: int):
        """As `generator.generator_net`, of pixels: the network sees those of the grid and answers for all."""

        def net(x, levels_BK, label_B, *, key=None):
            seen = rearrange(x[:, : self.grid**2], "b (h w) 1 c -> b h w c", h=self.grid)
            rngs = {"dropout": key} if training else None
            functions = image_functions(model, params, seen, levels_BK, label_B, deterministic=not training, rngs=rngs)
            return self.render(functions, chunk=chunk)

        return net

    def render(self, functions: ImageFunctions, *, chunk: int) -> Pixels:
        """Values on the grid and in the window."""
        inside = evaluate_rematerialised(functions, self.coordinates, self.cell, chunk=chunk)
        return self._joined(render_native(functions, key=None, chunk=chunk), inside)

    def _joined(self, *parts: Array) -> Pixels:
        flat = [rearrange(part, "b h w c -> b (h w) 1 c") if part.ndim == 4 else part[:, :, None] for part in parts]
        return jnp.concatenate(flat, axis=1)


def on_grid(images: Float[Array, "batch size size channels"], grid: int) -> Float[Array, "batch grid grid channels"]:
    """Images shrunk or enlarged by the cubic resize that data are read with."""
    return jax.image.resize(images, (images.shape[0], grid, grid, images.shape[-1]), "cubic", antialias=True)


def draw_windows(config, key: Key[Array, ""]) -> Windows:
    """A window anywhere in images of any size from the larger of grid and window to their own, the same for the whole batch."""
    largest, window = config.data.image_size, config.window or config.data.image_size
    smallest = min(max(config.grid, window), largest)
    size_key, corner_key = jax.random.split(key)
    size = jax.random.randint(size_key, (), smallest, largest + 1)
    return Windows(config.grid, window, size, jax.random.randint(corner_key, (2,), 0, size - window + 1))


def check_windows(config) -> None:
    """ValueError for grids and windows that cannot be."""
    size = config.data.image_size
    if config.grid < 0:
        raise ValueError(f"found grid {config.grid}, expected 0 or more pixels a side; change config.grid")
    if config.window and not config.grid:
        raise ValueError(f"found window {config.window} without a grid, expected both or neither; set config.grid")
    if not 0 <= config.window <= size:
        raise ValueError(
            f"found window {config.window} for images of {size}, expected one inside; change config.window"
        )
    if config.grid and config.distance not in ("l2", "pseudo_huber"):
        raise ValueError(
            f"found distance {config.distance!r} with a grid of its own, whose pixels are no image, expected 'l2' or "
            "'pseudo_huber'; change config.distance"
        )
    if config.grid and config.variational:
        raise ValueError("found variational coordinates with a grid of its own, expected config.variational=False")
