import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.coordinate_mlp import fourier_features
from fid_imagegen.models.function_generator import FunctionGenerator, function_kind
from fid_imagegen.models.function_predictors import LocalPredictor
from fid_imagegen.models.image_function import (
    ImageFunctions,
    PixelGrid,
    axis_coordinates,
    evaluate,
    pixel_cell,
    pixel_grid,
)
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.rendering import render

KIND = LocalMLP(channels=3, rows=2, columns=3, features=5, width=7, depth=3, bands=2)
GRID = (8, 12)  # patches of 4x4


@pytest.fixture(scope="module")
def functions():
    generator = np.random.default_rng(0)
    shared = jax.tree.map(
        lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32), KIND.init_shared(jax.random.key(0))
    )
    features = jnp.asarray(generator.standard_normal((2, 2, 3, 5)), jnp.float32)
    return ImageFunctions(kind=KIND, grid=GRID, shared=shared, per_image={"features": features})


def by_hand(functions, row, column, height, width):
    """The value of image 0 at pixel (row, column) of a render, in float64."""
    features = np.asarray(functions.per_image["features"][0], np.float64)
    place = (row + 0.5) / height * 2 - 0.5, (column + 0.5) / width * 3 - 0.5
    x = np.zeros(5)
    for i, j in itertools.product(range(2), range(3)):
        clipped = np.clip(place[0], 0, 1), np.clip(place[1], 0, 2)
        x += max(0, 1 - abs(clipped[0] - i)) * max(0, 1 - abs(clipped[1] - j)) * features[i, j]
    waves = []
    for wave in (np.cos, np.sin):
        for position, footprint in ((place[0], 2 / height), (place[1], 3 / width)):
            waves += [wave(2 * np.pi * k * position) * np.sinc(k * footprint) for k in (1, 2)]
    x = np.concatenate([x, waves])
    for layer in range(3):
        x = x @ np.asarray(functions.shared[f"kernel_{layer}"], np.float64) + np.asarray(
            functions.shared[f"bias_{layer}"], np.float64
        )
        x = np.asarray(jax.nn.gelu(x)) if layer < 2 else x
    return x


@pytest.mark.parametrize("size", [GRID, (16, 24), (5, 9)])
def test_values_are_the_definitions(functions, size):
    coords, cell = jnp.asarray(pixel_grid(*size)), jnp.asarray(pixel_cell(*size))
    found = jax.jit(evaluate)(functions, coords, cell)[0].reshape(*size, 3)
    for row, column in ((0, 0), (size[0] - 1, 2), (2, size[1] - 1), (3, 4)):
        np.testing.assert_allclose(found[row, column], by_hand(functions, row, column, *size), rtol=1e-4, atol=1e-4)


def test_the_base_is_kaiming_uniform():
    shared = dataclasses.replace(KIND, width=64).init_shared(jax.random.key(0))
    for layer, fan_in in enumerate((5 + 8, 64, 64)):
        kernel, bias = np.asarray(shared[f"kernel_{layer}"]), np.asarray(shared[f"bias_{layer}"])
        assert np.abs(kernel).max() == pytest.approx(fan_in**-0.5, rel=0.05) and kernel.shape[0] == fan_in
        assert 0.3 < np.abs(bias).max() * fan_in**0.5 <= 1 and not np.isin(bias, kernel).any()


def test_waves_are_averages_over_the_footprint():
    """Of both kinds of function: against the mean of a hundred point samples."""
    fine = axis_coordinates(400)
    coarse = axis_coordinates(4)
    mean = lambda values: np.asarray(values).reshape(4, 100, -1).mean(axis=1)  # noqa: E731
    line = lambda axis: jnp.asarray(np.stack([axis, axis], axis=1), jnp.float32)  # noqa: E731
    frequencies = np.array([0.5, 1.0, 3.0])
    found = fourier_features(line(coarse), frequencies, jnp.asarray([0.5, 0.5]))
    np.testing.assert_allclose(found, mean(fourier_features(line(fine), frequencies)), atol=1e-4)
    tall = fourier_features(line(coarse), frequencies, jnp.asarray([0.5, 0.0])).reshape(
        4, 2, 2, 3
    )  # wave, axis, frequency
    plain = fourier_features(line(coarse), frequencies).reshape(4, 2, 2, 3)
    np.testing.assert_allclose(tall, plain * np.stack([np.sinc(frequencies / 4), np.ones(3)]), atol=1e-6)
    place = lambda axis: line((axis + 1) / 2 * 2 - 0.5)  # noqa: E731
    nothing = jnp.zeros(2)
    found = KIND._encoded(place(coarse), jnp.asarray([0.5, 0.5]))
    np.testing.assert_allclose(found, mean(KIND._encoded(place(fine), nothing)), atol=1e-4)


def test_presets_reach_the_pixels_nyquist_rate():
    kind = function_kind("local64", channels=3, image_size=32, patch=4, cutoff="nyquist", depth=2)
    assert (kind.rows, kind.columns, kind.bands, kind.features, kind.depth) == (8, 8, 2, 32, 2)
    assert function_kind("local64", channels=3, image_size=32, patch=1, cutoff="nyquist").bands == 1
    with pytest.raises(ValueError, match="found groups for function 'local64', which has none"):
        function_kind("local64", channels=3, image_size=32, patch=4, cutoff="nyquist", groups=4)
    with pytest.raises(ValueError, match="found depth|found an image function of depth 1"):
        function_kind("local64", channels=3, image_size=32, patch=4, cutoff="nyquist", depth=1)


def test_the_generator_makes_local_functions():
    kind = LocalMLP(channels=3, rows=2, columns=2, features=5, width=7, depth=2)
    model = FunctionGenerator(kind, image_size=8, patch=4, width=16, heads=2, extractor_depth=1, predictor_depth=2)
    x, levels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32), jnp.zeros((2, 1))
    made, variables = jax.jit(model.init_with_output)(jax.random.key(0), x, levels)
    assert made.per_image["features"].shape == (2, 2, 2, 5)
    # The extractor's gates are closed at first: what a clean image is given is what pre-training gives it.
    again = jax.jit(functools.partial(model.apply, method="reconstruct"))(variables, x)
    np.testing.assert_allclose(made.per_image["features"], again.per_image["features"], atol=1e-6)
    # Patches stay where they are: their order is the image's.
    predictor = LocalPredictor(kind, width=16, heads=2, depth=0, remat=False, unroll=False)
    tokens = np.float32(np.random.default_rng(1).standard_normal((1, 4, 16)))
    condition = np.zeros((1, 16), np.float32)
    variables, apply = jax.jit(predictor.init)(jax.random.key(1), tokens, condition), jax.jit(predictor.apply)
    whole = np.asarray(apply(variables, tokens, condition)["features"])
    tokens[:, 1] *= np.linspace(-1, 1, 16)
    moved = np.asarray(apply(variables, tokens, condition)["features"])
    np.testing.assert_array_equal(np.argwhere(np.abs(moved - whole)[0].max(-1) > 1e-6), [[0, 1]])


def test_pixels_are_a_function_too():
    """A fixed-size generator's: exact on its own grid, Lanczos between."""
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 5, 3)), jnp.float32)
    functions = ImageFunctions(kind=PixelGrid(3), grid=(6, 5), shared={}, per_image={"pixels": pixels})
    np.testing.assert_array_equal(render(functions, 6, 5), pixels)
    assert render(functions, 13, 20).shape == (2, 13, 20, 3)
    flat = functions.replace(per_image={"pixels": jnp.ones_like(pixels)})
    np.testing.assert_allclose(render(flat, 17, 9), 1, atol=1e-5)
