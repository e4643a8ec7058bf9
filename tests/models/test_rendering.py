import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models import rendering
from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.image_function import axis_coordinates, evaluate, pixel_cell, pixel_grid
from fid_imagegen.models.rendering import quantise, render

GREY = CoordinateMLP(channels=1, width=8, depth=3, bands=4, groups=4, cutoff=6.0)
COLOUR = CoordinateMLP(channels=3, width=16, depth=3, bands=4, groups=4, cutoff=6.0, weight_update="scale")


@pytest.fixture(scope="module")
def grey(make_functions):
    """One bare function of a square grid."""
    return make_functions(GREY, 1, (12, 12))


@pytest.fixture(scope="module")
def colour(make_functions):
    """Three functions of a wide grid, as multi-step samples are: each with its own noisy image."""
    return make_functions(COLOUR, 3, (10, 14), native=True)


def test_the_training_grid(colour):
    found = render(colour, 10, 14)
    expected = evaluate(colour, jnp.asarray(pixel_grid(10, 14)), jnp.asarray(pixel_cell(10, 14)))
    np.testing.assert_allclose(found, expected.reshape(3, 10, 14, 3), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 1), (33, 50)])
def test_any_size_is_the_function_at_its_pixel_centres(colour, reference, height, width):
    found = render(colour, height, width, filter="point")
    assert found.shape == (3, height, width, 3) and found.dtype == np.float32
    cell = pixel_cell(height, width)
    expected = reference(colour, axis_coordinates(height), axis_coordinates(width), cell)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_chunked_equals_unchunked(grey):
    whole = render(grey, 25, 25)  # 625 pixels in one chunk of 1024, then in ten of 64
    np.testing.assert_allclose(render(grey, 25, 25, chunk=64), whole, atol=1e-6)
    with pytest.raises(ValueError, match="found chunk 300, expected a multiple of 64"):
        render(grey, 25, 25, chunk=300)


def test_more_images_than_one_call_takes(colour, monkeypatch):
    whole = render(colour, 15, 15)
    monkeypatch.setattr(rendering, "IMAGES_PER_CALL", 2)
    np.testing.assert_allclose(render(colour, 15, 15), whole, atol=1e-6)


# (height, width) of the whole; (top, left, height, width) of the window in its pixels. The smaller wholes are area-filtered.
WINDOWS = [
    ((64, 48), (0, 0, 64, 48)),
    ((64, 48), (21, 7, 13, 31)),
    ((33, 77), (32, 76, 1, 1)),
    ((33, 77), (5, 0, 28, 77)),
    ((7, 6), (2, 1, 5, 1)),
    ((6, 7), (1, 2, 1, 4)),
    ((3, 90), (1, 30, 2, 45)),
    ((3000, 4096), (1234, 4000, 5, 7)),
]


def _part(whole, window):
    (height, width), (top, left, h, w) = whole, window
    return top / height, left / width, (top + h) / height, (left + w) / width


@pytest.mark.parametrize("name", ["grey", "colour"])
@pytest.mark.parametrize(("dtype", "chunk"), [(np.float32, 1024), (np.float32, 64), (np.uint8, 1024)])
@pytest.mark.parametrize(("whole", "window"), WINDOWS[:-1])
def test_a_pixel_aligned_window_is_the_crop_bit_for_bit(request, name, dtype, chunk, whole, window):
    functions, (top, left, height, width) = request.getfixturevalue(name), window
    # The wholes are no multiples of a chunk: a window's pixels fall at other places of other chunks.
    crop = render(functions, *whole, dtype=dtype, chunk=chunk)[:, top : top + height, left : left + width]
    found = render(functions, height, width, window=_part(whole, window), dtype=dtype, chunk=chunk)
    np.testing.assert_array_equal(found, crop)


def test_aligned_windows_are_found_whatever_their_fractions_round_to():
    generator = np.random.default_rng(0)
    for _ in range(3000):
        full = int(generator.integers(1, 20_000))
        start, stop = np.sort(generator.choice(full + 1, 2, replace=False)).tolist()
        assert rendering.window_axis(stop - start, start / full, stop / full) == (full, start)
    assert rendering.window_axis(10, 0.101, 0.203) == pytest.approx((10 / 0.102, 0.101 * 10 / 0.102))


@pytest.mark.slow
def test_windows_are_crops_in_fully_optimised_programs_too():
    """The suite compiles without LLVM's optimiser, which chooses the vectors that leftover rows do not fill."""
    flags = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=3"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "bit_for_bit"]
    done = subprocess.run(command, env=flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_small_window_of_a_large_whole(colour, reference):
    whole, (top, left, height, width) = WINDOWS[-1]
    found = render(colour, height, width, window=_part(*WINDOWS[-1]))
    rows, columns = (
        axis_coordinates(n)[o : o + s] for n, o, s in zip(whole, (top, left), (height, width), strict=True)
    )
    np.testing.assert_allclose(found, reference(colour, rows, columns, pixel_cell(*whole)), atol=1e-4)


@pytest.mark.parametrize("window", [(0.137, 0.291, 0.613, 0.884), (0.5, 0.0, 0.51, 1.0), (0.123456, 0.2, 0.7, 0.20001)])
def test_any_other_window_is_the_function_at_its_coordinates(colour, reference, window):
    height, width = 24, 31
    top, left, bottom, right = window
    rows = 2 * (top + (np.arange(height) + 0.5) / height * (bottom - top)) - 1
    columns = 2 * (left + (np.arange(width) + 0.5) / width * (right - left)) - 1
    cell = 2 * (bottom - top) / height, 2 * (right - left) / width
    found = render(colour, height, width, window=window)
    np.testing.assert_allclose(found, reference(colour, rows, columns, cell), atol=1e-4)


def test_area_averages_sub_pixels_below_the_training_size(colour):
    # 10x14 at 4x14: ceil(10 / 4) = 3 sub-pixels down, 1 across. At 5x3: 2 down, 5 across.
    for (height, width), (down, across) in {(4, 14): (3, 1), (5, 3): (2, 5)}.items():
        fine = render(colour, height * down, width * across, filter="point")
        box = fine.reshape(3, height, down, width, across, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(render(colour, height, width), box, atol=1e-6)
        assert np.abs(render(colour, height, width, filter="point") - box).max() > 1e-2


def test_at_and_above_the_training_size_both_filters_are_points(grey):
    for size in (12, 13, 40):
        np.testing.assert_array_equal(render(grey, size, size), render(grey, size, size, filter="point"))


def test_bytes_are_the_values_rounded(colour):
    for size in (6, 20):  # averaged, and not
        values = render(colour, size, size)
        expected = np.clip(np.rint((values + 1) * 127.5), 0, 255)
        found = render(colour, size, size, dtype=np.uint8)
        assert found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.999
        np.testing.assert_array_equal(render(colour, size, size, dtype="uint8"), found)


@pytest.mark.parametrize("module", [np, jnp])
def test_quantise(module):
    images = module.asarray([-3.0, -1.0, 1 / 127.5 - 1, 0.0, 1.0, 3.0], dtype=module.float32)
    np.testing.assert_array_equal(quantise(images), np.uint8([0, 0, 1, 128, 255, 255]))


def test_a_new_size_compiles_nothing(colour, caplog):
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x * 3.25)(1.0)
        assert "Finished XLA compilation" in caplog.text  # what is looked for below would be there
        for dtype in (np.float32, np.uint8):
            render(colour, 15, 15, dtype=dtype)
        caplog.clear()
        for dtype in (np.float32, np.uint8):
            for height, width in ((5, 9), (16, 8), (45, 37)):
                render(colour, height, width, window=(0.1, 0.2, 0.8, 0.7), dtype=dtype)
        assert "Finished XLA compilation" not in caplog.text


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2**14, 2**14 + 1), (1, 10**9)])
def test_sizes_that_cannot_be(grey, size):
    with pytest.raises(ValueError, match=f"found a render size of {size[0]}x{size[1]}, expected .*; ask for"):
        render(grey, *size)
    rendering.check_size(2**14, 2**14)  # the largest


@pytest.mark.parametrize(
    "window", [(0, 0, 0, 1), (0.5, 0, 0.4, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, float("nan"), 1, 1)]
)
def test_windows_that_cannot_be(grey, window):
    with pytest.raises(ValueError, match="found window .*expected .top, left, bottom, right"):
        render(grey, 4, 4, window=window)


def test_filters_and_types_that_cannot_be(grey):
    with pytest.raises(ValueError, match="found filter 'box', expected 'area' or 'point'"):
        render(grey, 4, 4, filter="box")
    with pytest.raises(ValueError, match="found dtype float64, expected float32 or uint8"):
        render(grey, 4, 4, dtype=float)


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from fid_imagegen.models.function_generator import function_kind
from fid_imagegen.models.image_function import ImageFunctions
from fid_imagegen.models.rendering import render

kind = function_kind("5x64", channels=3, image_size=32, patch=4, cutoff="nyquist")
columns = zip(kind.layer_sizes, kind.columns)
per_image = {f"columns_{i}": jnp.ones((1, fan_in, count)) for i, ((fan_in, _), count) in enumerate(columns)}
functions = ImageFunctions(kind=kind, grid=(32, 32), shared=kind.init_shared(jax.random.key(0)), per_image=per_image)
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert render(functions, int(sys.argv[1]), int(sys.argv[1]), dtype=np.uint8).any()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024)
"""


# All features of 1024x1024 pixels at once would take 512 MiB, of 4096x4096 8 GiB.
@pytest.mark.parametrize(("size", "mebibytes"), [(1024, 256), pytest.param(4096, 1024, marks=pytest.mark.slow)])
def test_memory_of_a_large_render(size, mebibytes):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(size)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < mebibytes
