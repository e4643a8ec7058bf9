import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.function_generator import FunctionGenerator, function_kind
from fid_imagegen.models.image_function import ImageFunctions, evaluate, pixel_cell, pixel_grid
from fid_imagegen.models.patch_function import PatchMLP
from fid_imagegen.models.rendering import render
from fid_imagegen.tasks.generator import render_native

KIND = PatchMLP(channels=3, rows=2, columns=3, width=5, bands=4)
GRID = (8, 12)  # patches of 4x4


@pytest.fixture(scope="module")
def functions():
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    shared = jax.tree.map(lambda x: draw(*x.shape), KIND.init_shared(jax.random.key(0)))
    return ImageFunctions(kind=KIND, grid=GRID, shared=shared, per_image={"features": draw(2, 2, 3, KIND.features)})


def by_hand(functions, row, column, height, width):
    """The value of image 0 at pixel (row, column) of a render, in float64: patch by patch."""
    features = np.asarray(functions.per_image["features"][0], np.float64)
    shared = {name: np.asarray(value, np.float64) for name, value in functions.shared.items()}
    place, footprint = ((row + 0.5) / height * 2 - 0.5, (column + 0.5) / width * 3 - 0.5), (2 / height, 3 / width)
    total, weights = np.zeros(3), 0.0
    for i, j in np.ndindex(2, 3):
        away = place[0] - i, place[1] - j
        if max(map(abs, away)) >= 1:
            continue
        first = shared["first"] + features[i, j, : 16 * 5].reshape(16, 5) / 4
        second = shared["second"] + features[i, j, 80:95].reshape(5, 3) / np.sqrt(5)
        k = np.arange(4)
        waves = [np.cos(np.pi / 2 * k * (s + 1)) * np.sinc(k * w / 4) for s, w in zip(away, footprint, strict=True)]
        h = np.outer(*waves).ravel() @ first
        weight = np.cos(np.pi / 2 * away[0]) ** 2 * np.cos(np.pi / 2 * away[1]) ** 2
        total += weight * ((h / (1 + np.exp(-h))) @ second + shared["bias"] + features[i, j, 95:])
        weights += weight
    return total / weights


@pytest.mark.parametrize("size", [GRID, (16, 24), (5, 9)])
def test_values_are_the_definitions(functions, size):
    coords, cell = jnp.asarray(pixel_grid(*size)), jnp.asarray(pixel_cell(*size))
    found = jax.jit(evaluate)(functions, coords, cell)[0].reshape(*size, 3)
    for row, column in ((0, 0), (size[0] - 1, 2), (2, size[1] - 1), (3, 4)):
        np.testing.assert_allclose(found[row, column], by_hand(functions, row, column, *size), rtol=1e-4, atol=1e-4)


def test_the_training_grid_read_patch_by_patch_is_the_same(functions):
    native = jax.jit(functools.partial(render_native, key=None, chunk=4096))
    np.testing.assert_allclose(native(functions), render(functions, *GRID), atol=2e-5)


def test_the_base_is_zero_behind_waves_of_unit_weight():
    shared = PatchMLP(channels=3, rows=2, columns=3, width=64, bands=8).init_shared(jax.random.key(0))
    assert float(shared["first"].std()) == pytest.approx(1 / 8, rel=0.05)
    assert not shared["second"].any() and not shared["bias"].any()


def test_the_generator_makes_functions_of_patches():
    kind = function_kind("patch32", channels=1, image_size=8, patch=4, cutoff="nyquist", width=6)
    assert (kind.rows, kind.bands, kind.width) == (2, 8, 6)
    model = FunctionGenerator(kind, image_size=8, patch=4, width=16, heads=2, extractor_depth=1, predictor_depth=1)
    x, levels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32), jnp.zeros((2, 1))
    made, _ = jax.jit(model.init_with_output)(jax.random.key(0), x, levels)
    assert made.per_image["features"].shape == (2, 2, 2, kind.features)
    assert np.isfinite(render(made, 20, 13)).all()
