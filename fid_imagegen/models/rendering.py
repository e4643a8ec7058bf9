"""Rendering image functions to arrays at any height, width and window.

The grid is cut into chunks of a fixed number of coordinates, and one compiled call serves them all: a new size costs no
compilation, and memory does not grow with the size. Coordinates are made on the host from integer pixel indices, so that a
pixel has the same coordinates whichever window it is rendered in.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fid_imagegen.models.image_function import ImageFunctions, axis_coordinates, evaluate, pixel_cell

Window = tuple[float, float, float, float]
MAX_PIXELS = 2**28  # 16,384 x 16,384: above it a size is a typing error more often than a wish
CHUNK = 1024
# Matrix products treat the rows left over after whole registers differently: in chunks of a multiple of this, a pixel's bits
# do not depend on its place in the chunk, and a window equals the crop.
CHUNK_STEP = 64
IMAGES_PER_CALL = 64


def quantise(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1] -> uint8 0..255: rounded to nearest, values outside clipped."""
    # numpy stays numpy: outside of jit, jnp would compile anew for every size.
    module = np if isinstance(images, np.ndarray) else jnp
    return module.clip(module.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


@jax.jit
def _chunk_values(functions: ImageFunctions, coords_N2, cell_2):
    return evaluate(functions, coords_N2, cell_2)


@jax.jit
def _chunk_bytes(functions: ImageFunctions, coords_N2, cell_2):
    return quantise(evaluate(functions, coords_N2, cell_2))


def window_axis(size: int, start: float, stop: float) -> tuple[float, float]:
    """(full, offset) in pixels: a window of `size` pixels from `start` to `stop` is part of an axis of `full` pixels.

    Values within a millionth of a pixel of an integer are that integer: such a window is pixel-aligned and equals the crop.
    """
    full = size / (stop - start)
    full = round(full) if abs(full - round(full)) < 1e-6 else full
    offset = start * full
    return full, round(offset) if abs(offset - round(offset)) < 1e-6 else offset


def check_size(height: int, width: int) -> None:
    """Raises ValueError unless 1 <= height, width and height * width <= MAX_PIXELS."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(
            f"found a render size of {height}x{width}, expected at least 1x1 and at most {MAX_PIXELS:,} pixels; "
            "ask for a smaller size, or for windows of the large one"
        )


def check_window(window: Window) -> None:
    """Raises ValueError unless 0 <= top < bottom <= 1 and 0 <= left < right <= 1."""
    top, left, bottom, right = window
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"found window {tuple(window)}, expected (top, left, bottom, right) with 0 <= top < bottom <= 1 and "
            "0 <= left < right <= 1; give fractions of the whole image"
        )


def render(
    functions: ImageFunctions,
    height: int,
    width: int,
    *,
    window: Window | None = None,
    filter: Literal["area", "point"] = "area",
    dtype: np.typing.DTypeLike = np.float32,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Renders every function to [batch, height, width, channels].

    window: (top, left, bottom, right) as fractions of the image; None is all of it.
    filter: "area" averages sub-pixels where the render is coarser than the training grid, because point samples of a
        function finer than the pixels alias; at and above the training size both are point samples.
    dtype: np.float32 gives values (about [-1, 1], not clipped), np.uint8 gives 0..255.
    chunk: coordinates per compiled call, a multiple of CHUNK_STEP.
    Raises ValueError for sizes, windows, filters, dtypes and chunks outside these.
    """
    check_size(height, width)
    window = (0.0, 0.0, 1.0, 1.0) if window is None else window
    check_window(window)
    if filter not in ("area", "point"):
        raise ValueError(f"found filter {filter!r}, expected 'area' or 'point'")
    if chunk < 1 or chunk % CHUNK_STEP:
        raise ValueError(f"found chunk {chunk}, expected a multiple of {CHUNK_STEP}")
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.uint8):
        raise ValueError(f"found dtype {dtype}, expected float32 or uint8; convert the rendered array")
    full_height, top = window_axis(height, window[0], window[2])
    full_width, left = window_axis(width, window[1], window[3])
    down, across = 1, 1
    if filter == "area":
        down = max(1, math.ceil(functions.grid[0] / full_height - 1e-9))
        across = max(1, math.ceil(functions.grid[1] / full_width - 1e-9))
    rows = axis_coordinates(height * down, full=full_height * down, offset=top * down)
    columns = axis_coordinates(width * across, full=full_width * across, offset=left * across)
    cell = pixel_cell(full_height * down, full_width * across)
    if down == across == 1:
        return _render_points(functions, rows, columns, cell, dtype, chunk)
    values = _render_points(functions, rows, columns, cell, np.dtype(np.float32), chunk)
    # Sub-pixels are added one after another: numpy's mean adds in an order that depends on the shape, and a window would
    # no longer equal the crop bit for bit.
    values = sum(values[:, start::down] for start in range(down))
    values = sum(values[:, :, start::across] for start in range(across)) / np.float32(down * across)
    return quantise(values) if dtype == np.uint8 else values


def _render_points(functions, rows, columns, cell, dtype, chunk) -> np.ndarray:
    """Point samples on the product of two float64 axes."""
    call = _chunk_bytes if dtype == np.uint8 else _chunk_values
    batch, pixels, channels = len(functions), len(rows) * len(columns), functions.kind.channels
    out = np.empty((batch, pixels, channels), dtype)
    for first in range(0, batch, IMAGES_PER_CALL):
        images = slice(first, min(first + IMAGES_PER_CALL, batch))
        group = functions[images] if batch > IMAGES_PER_CALL else functions
        for start in range(0, pixels, chunk):
            index = np.minimum(np.arange(start, start + chunk), pixels - 1)
            coords = np.stack([rows[index // len(columns)], columns[index % len(columns)]], axis=1).astype(np.float32)
            stop = min(start + chunk, pixels)
            out[images, start:stop] = np.asarray(call(group, coords, cell))[:, : stop - start]
    return out.reshape(batch, len(rows), len(columns), channels)
