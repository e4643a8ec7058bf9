import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

from fid_imagegen.models.function_generator import FunctionGenerator, function_kind
from fid_imagegen.models.image_function import ImageFunctions, evaluate, pixel_cell, pixel_grid
from fid_imagegen.models.layers import unpatchify
from fid_imagegen.models.pixel_function import PixelMLP, _interpolated
from fid_imagegen.models.rendering import render
from fid_imagegen.tasks.generator import render_native

KIND = PixelMLP(channels=3, rows=2, columns=3, patch=4, values=5, width=7)
GRID = (8, 12)


@pytest.fixture(scope="module")
def functions():
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    shared = jax.tree.map(lambda x: draw(*x.shape), KIND.init_shared(jax.random.key(0)))
    return ImageFunctions(kind=KIND, grid=GRID, shared=shared, per_image={"features": draw(2, 2, 3, KIND.features)})


def test_on_the_training_grid_every_pixel_is_read_by_itself(functions):
    """Pixel (p, q) of patch (i, j), in float64; so are its render and its fast form."""
    features = np.asarray(functions.per_image["features"][0], np.float64)
    shared = {name: np.asarray(value, np.float64) for name, value in functions.shared.items()}
    expected = np.zeros((*GRID, 3))
    for i, j, p, q in itertools.product(range(2), range(3), range(4), range(4)):
        x = features[i, j, (p * 4 + q) * 5 :][:5]
        hidden = np.asarray(jax.nn.gelu(x @ shared["kernel_0"] + shared["bias_0"]))
        expected[4 * i + p, 4 * j + q] = x[:3] + hidden @ shared["kernel_1"] + shared["bias_1"]
    np.testing.assert_allclose(render_native(functions, key=None, chunk=4096)[0], expected, atol=1e-4)
    np.testing.assert_allclose(render(functions, *GRID)[0], expected, atol=1e-4)


def test_between_pixels_features_are_catmull_roms():
    """Against SciPy's Hermite splines with central differences for slopes, away from the border; the border repeats."""
    x = np.random.default_rng(1).standard_normal((9, 9))
    slopes = lambda line: np.gradient(line)  # noqa: E731
    spline = lambda line: CubicHermiteSpline(np.arange(9), line, slopes(line))  # noqa: E731
    places = np.array([[3.0, 4.0], [2.25, 5.5], [5.9, 3.1]])
    expected = [spline([float(spline(line)(column)) for line in x])(row) for row, column in places]
    coords = jnp.asarray(2 * (places + 0.5) / 9 - 1, jnp.float32)
    np.testing.assert_allclose(_interpolated(jnp.asarray(x, jnp.float32)[..., None], coords)[:, 0], expected, atol=1e-5)
    corner = _interpolated(jnp.asarray(x, jnp.float32)[..., None], jnp.asarray([[-1.0, -1.0]]))
    assert np.isfinite(corner).all()
    flat = _interpolated(jnp.ones((9, 9, 1)), jnp.asarray(pixel_grid(20, 13)))
    np.testing.assert_allclose(flat, 1, atol=1e-6)


def test_a_fresh_function_is_its_interpolated_colours(functions):
    fresh = functions.replace(shared=KIND.init_shared(jax.random.key(0)))
    coords, cell = jnp.asarray(pixel_grid(*GRID)), jnp.asarray(pixel_cell(*GRID))
    colours = np.asarray(functions.per_image["features"]).reshape(2, 2, 3, 4, 4, 5)[..., :3]
    expected = colours.swapaxes(2, 3).reshape(2, 8, 12, 3)
    np.testing.assert_allclose(evaluate(fresh, coords, cell).reshape(2, *GRID, 3), expected, atol=1e-5)


def test_the_generator_makes_functions_of_pixels():
    kind = function_kind("pixel32", channels=1, image_size=8, patch=4, cutoff="nyquist", width=6)
    assert (kind.rows, kind.patch, kind.values, kind.width) == (2, 4, 16, 6)
    model = FunctionGenerator(kind, image_size=8, patch=4, width=16, heads=2, extractor_depth=1, predictor_depth=1)
    x, levels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32), jnp.zeros((2, 1))
    made, variables = jax.jit(model.init_with_output)(jax.random.key(0), x, levels)
    assert made.per_image["features"].shape == (2, 2, 2, kind.features)
    assert np.isfinite(render(made, 20, 13)).all()
    # What a patch says of its pixels, and what a convolution over all of them, zeros at first, adds.
    pixels = lambda functions: unpatchify(functions.per_image["features"].reshape(2, 4, -1), 4, 2)  # noqa: E731
    alone, rng = np.asarray(pixels(made)), np.random.default_rng(1)
    join = jax.tree.map(lambda zeros: rng.standard_normal(zeros.shape), variables["params"]["predictor"]["join"])
    variables["params"]["predictor"]["join"] = join
    assert np.abs(alone).max() > 0.1 and join["kernel"].shape == (3, 3, 16, 16)
    around = np.pad(jax.nn.gelu(alone), ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [around[:, p : p + 8, q : q + 8] @ join["kernel"][p, q] for p, q in np.ndindex(3, 3)]
    expected = alone + sum(terms) + join["bias"]
    np.testing.assert_allclose(pixels(jax.jit(model.apply)(variables, x, levels)), expected, rtol=1e-4, atol=1e-4)


def test_fewer_features_than_channels_are_refused():
    with pytest.raises(ValueError, match="found 2 features a pixel, expected at least the 3 channels"):
        PixelMLP(channels=3, rows=1, columns=1, patch=2, values=2)
    with pytest.raises(ValueError, match="found features for function 'pixel32', which has none"):
        function_kind("pixel32", channels=3, image_size=8, patch=4, cutoff="nyquist", features=4)
