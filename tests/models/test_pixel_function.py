import functools
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
    native = jax.jit(functools.partial(render_native, key=None, chunk=4096))
    np.testing.assert_allclose(native(functions)[0], expected, atol=1e-4)
    np.testing.assert_allclose(render(functions, *GRID)[0], expected, atol=1e-4)


def test_between_pixels_features_are_catmull_roms():
    """Against SciPy's Hermite splines with central differences for slopes, away from the border; the border repeats."""
    x = np.random.default_rng(1).standard_normal((9, 9))
    slopes = lambda line: np.gradient(line)  # noqa: E731
    spline = lambda line: CubicHermiteSpline(np.arange(9), line, slopes(line))  # noqa: E731
    places = np.array([[3.0, 4.0], [2.25, 5.5], [5.9, 3.1]])
    expected = [spline([float(spline(line)(column)) for line in x])(row) for row, column in places]
    coords = jnp.asarray(2 * (places + 0.5) / 9 - 1, jnp.float32)
    interpolated = jax.jit(_interpolated)
    np.testing.assert_allclose(interpolated(np.float32(x)[..., None], coords)[:, 0], expected, atol=1e-5)
    assert np.isfinite(interpolated(np.float32(x)[..., None], np.float32([[-1, -1]]))).all()
    flat = interpolated(np.ones((9, 9, 1), np.float32), pixel_grid(20, 13))
    np.testing.assert_allclose(flat, 1, atol=1e-6)


def test_a_fresh_function_is_its_interpolated_colours(functions):
    fresh = functions.replace(shared=KIND.init_shared(jax.random.key(0)))
    coords, cell = jnp.asarray(pixel_grid(*GRID)), jnp.asarray(pixel_cell(*GRID))
    colours = np.asarray(functions.per_image["features"]).reshape(2, 2, 3, 4, 4, 5)[..., :3]
    expected = colours.swapaxes(2, 3).reshape(2, 8, 12, 3)
    found = jax.jit(evaluate)(fresh, coords, cell)
    np.testing.assert_allclose(found.reshape(2, *GRID, 3), expected, atol=1e-5)


@pytest.fixture(scope="module")
def generator():
    """A generator of functions of pixels: (its module, its fresh variables, images and levels)."""
    kind = function_kind("pixel32", channels=1, image_size=8, patch=4, cutoff="nyquist", width=6)
    assert (kind.rows, kind.patch, kind.values, kind.width) == (2, 4, 16, 6)
    model = FunctionGenerator(kind, image_size=8, patch=4, width=16, heads=2, extractor_depth=1, predictor_depth=1)
    rng = np.random.default_rng(0)
    x, levels = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 8, 8, 1), (2, 1)))
    return model, jax.jit(model.init)(jax.random.key(0), x, levels), x, levels


def _randomised(tree, scale=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), tree)


def test_the_generator_makes_functions_of_pixels(generator):
    """What the level makes of a patch, what the patch says of its pixels, and what a convolution over all of them adds."""
    model, variables, x, levels = generator
    made = jax.jit(model.apply)(variables, x, levels)
    assert made.per_image["features"].shape == (2, 2, 2, model.kind.features)
    assert not np.any(made.per_image["features"]) and np.isfinite(render(made, 20, 13)).all()
    ends = {name: variables["params"]["predictor"][name] for name in ("modulation", "head", "join")}
    ends = _randomised(ends)
    params = variables["params"] | {"predictor": variables["params"]["predictor"] | ends}
    features = jax.jit(model.apply)({"params": params}, x, levels).per_image["features"]
    # The gates of all blocks are closed, so that the head sees the patches' own tokens.
    inside = lambda model: (model.patches(x), model.extractor(model.patches(x), levels, None, True, (2, 2))[1])  # noqa: E731
    found = jax.jit(functools.partial(model.apply, method=inside))({"params": params})
    tokens, condition = (np.asarray(array, np.float64) for array in found)
    dense = lambda name, x: x @ np.asarray(ends[name]["kernel"], np.float64) + ends[name]["bias"]  # noqa: E731
    shift, scale = np.split(dense("modulation", condition / (1 + np.exp(-condition)))[:, None], 2, axis=-1)
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    alone = np.asarray(unpatchify(jnp.asarray(dense("head", tokens * (1 + scale) + shift)), 4, 2))
    around = np.pad(jax.nn.gelu(alone), ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [around[:, p : p + 8, q : q + 8] @ ends["join"]["kernel"][p, q] for p, q in np.ndindex(3, 3)]
    found = unpatchify(features.reshape(2, 4, -1), 4, 2)
    np.testing.assert_allclose(found, alone + sum(terms) + ends["join"]["bias"], rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_a_pretrained_predictor_without_a_jump(generator):
    """Pre-training knows no level: only biases of modulations learn, and behind closed gates every level gives what it gave."""
    model, variables, x, levels = generator
    reconstruct = jax.jit(lambda params: model.apply({"params": params}, x, method="reconstruct").per_image["features"])
    loss = lambda params: jnp.sum((reconstruct(params) - 1) ** 2)  # noqa: E731
    randomised = variables["params"] | {"predictor": _randomised(variables["params"]["predictor"])}
    gradient = jax.jit(jax.grad(loss))(randomised)["predictor"]
    for module in (gradient["modulation"], gradient["blocks"]["modulation"]):
        assert not np.any(module["kernel"]) and np.any(module["bias"])
    closed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "modulation" in str(path) and "kernel" in str(path) else leaf,
        randomised,
    )
    before = reconstruct(closed)
    after = jax.jit(model.apply)({"params": closed}, x, levels).per_image["features"]
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_fewer_features_than_channels_are_refused():
    with pytest.raises(ValueError, match="found 2 features a pixel, expected at least the 3 channels"):
        PixelMLP(channels=3, rows=1, columns=1, patch=2, values=2)
    with pytest.raises(ValueError, match="found features for function 'pixel32', which has none"):
        function_kind("pixel32", channels=3, image_size=8, patch=4, cutoff="nyquist", features=4)
