import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models import image_function, resampling
from fid_imagegen.models.coordinate_mlp import FUNCTION_PRESETS, CoordinateMLP, fourier_features
from fid_imagegen.models.function_generator import function_kind
from fid_imagegen.models.image_function import (
    axis_coordinates,
    evaluate_rematerialised,
    pixel_cell,
    pixel_grid,
    variational_coordinates,
)

evaluate = jax.jit(image_function.evaluate)
lanczos_weights = jax.jit(resampling.lanczos_weights, static_argnums=2)
SMALL = CoordinateMLP(channels=3, width=8, depth=3, bands=3, groups=4, cutoff=4.0)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_coordinates_are_pixel_centres(size):
    np.testing.assert_allclose(axis_coordinates(size), 2 * (np.arange(size) + 0.5) / size - 1, rtol=0, atol=1e-15)


def test_grid_is_row_major_with_the_row_first():
    expected = [[r, c] for r in (-0.5, 0.5) for c in (-2 / 3, 0, 2 / 3)]
    np.testing.assert_allclose(pixel_grid(2, 3), np.float32(expected), rtol=1e-7)
    assert pixel_grid(2, 3).dtype == np.float32
    np.testing.assert_array_equal(pixel_cell(2, 3), np.float32([1, 2 / 3]))


@pytest.mark.parametrize(("full", "offset", "size"), [(10, 4, 3), (33, 32, 1), (7, 0, 7)])
def test_a_window_has_the_coordinates_of_the_crop(full, offset, size):
    window = axis_coordinates(size, full=full, offset=offset)
    np.testing.assert_array_equal(window, axis_coordinates(full)[offset : offset + size])


def test_variational_coordinates():
    size, sigma, bound = 32, 0.3, 0.5
    coords = jnp.zeros((20_000, 2))
    jitter = size * np.asarray(variational_coordinates(coords, jax.random.key(0), size=size))
    assert np.abs(jitter).max() == bound  # clipped: at a quarter of the pitch, which is 2 / size
    c = bound / sigma
    inside, density = math.erf(c / math.sqrt(2)), math.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)
    variance = sigma**2 * (inside - 2 * c * density) + bound**2 * (1 - inside)
    assert jitter.var() == pytest.approx(variance, rel=0.03)
    assert (np.abs(jitter) == bound).mean() == pytest.approx(1 - inside, rel=0.05)
    assert np.abs(np.corrcoef(jitter.T)[0, 1]) < 0.03  # row and column are drawn apart


def test_phases_are_exact_at_the_papers_cutoff():
    frequencies = CoordinateMLP(channels=3).frequencies
    assert frequencies[-1] == pytest.approx(1024)
    axis = axis_coordinates(64)
    exact = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    phases = (np.pi * exact[:, :, None] * frequencies).reshape(len(exact), -1)
    assert phases.max() > 3100
    found = fourier_features(jnp.asarray(pixel_grid(64, 64)), frequencies)
    assert np.abs(found - np.concatenate([np.cos(phases), np.sin(phases)], axis=1)).max() < 1e-3


def test_features_at_twice_the_size_average_to_those_at_the_size():
    """The mean over a pixel's 2x2 sub-pixels is the feature at its centre, damped by cos(pi w / 2N): trap 12."""
    size, frequencies = 6, np.asarray([1.0, 2.0, 3.0])
    fine = np.asarray(fourier_features(jnp.asarray(pixel_grid(2 * size, 2 * size)), frequencies))
    averaged = fine.reshape(size, 2, size, 2, -1).mean(axis=(1, 3)).reshape(size**2, -1)
    coarse = np.asarray(fourier_features(jnp.asarray(pixel_grid(size, size)), frequencies))
    np.testing.assert_allclose(averaged, coarse * np.tile(np.cos(np.pi * frequencies / (2 * size)), 4), atol=2e-6)


def test_the_cutoff_is_the_nyquist_rate_of_the_training_grid_unless_stated():
    frequencies = function_kind("5x256", channels=3, image_size=32, patch=4, cutoff="nyquist").frequencies
    assert (frequencies[0], frequencies[-1]) == (1, pytest.approx(16))
    np.testing.assert_allclose(frequencies[1:] / frequencies[:-1], 16 ** (1 / 63))
    assert function_kind("5x256", channels=3, image_size=32, patch=4, cutoff="1024").cutoff == 1024
    with pytest.raises(ValueError, match="found cutoff 'nyqist'.*'nyquist' or cycles"):
        function_kind("5x256", channels=3, image_size=32, patch=4, cutoff="nyqist")
    with pytest.raises(ValueError, match="found function preset '9x9'.*5x256"):
        function_kind("9x9", channels=3, image_size=32, patch=4, cutoff="nyquist")


@pytest.mark.parametrize(("size", "percent"), [(32, 59), (64, 50), (128, 41), (178, 36)])
def test_share_of_the_papers_bands_above_nyquist(size, percent):
    assert round(100 * np.mean(CoordinateMLP(channels=3).frequencies > size / 2)) == percent


@pytest.mark.parametrize(("preset", "macs"), [("5x256", 262_912), ("5x128", 82_304), ("5x64", 20_672)])
def test_multiplications_per_pixel(preset, macs):
    kind = CoordinateMLP(channels=3, **FUNCTION_PRESETS[preset])
    assert sum(fan_in * fan_out for fan_in, fan_out in kind.layer_sizes) == macs


def test_the_faithful_function_has_transinrs_sizes():
    kind = CoordinateMLP(channels=3, **FUNCTION_PRESETS["5x256"])
    shared = jax.eval_shape(kind.init_shared, jax.random.key(0))
    assert sum(x.size for name, x in shared.items() if name != "gain") == 263_939
    assert sum(kind.columns) == 259  # weight tokens
    assert sum(fan_in * n for (fan_in, _), n in zip(kind.layer_sizes, kind.columns, strict=True)) == 66_304


def test_normalised_columns_have_unit_norm_over_fan_in(make_functions):
    functions = make_functions(SMALL, 1, (4, 4))
    one = jax.tree.map(lambda x: x[0], functions.per_image)
    for layer in range(SMALL.depth):
        matrix = np.asarray(jax.jit(SMALL.matrix, static_argnums=2)(functions.shared, one, layer))
        assert matrix.shape == SMALL.layer_sizes[layer]
        np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1, rtol=1e-5)


def test_column_j_uses_prediction_j_modulo_the_groups(make_functions):
    kind = dataclasses.replace(SMALL, weight_update="scale")
    functions = make_functions(kind, 1, (4, 4))
    one = jax.tree.map(lambda x: x[0], functions.per_image)
    matrix = np.asarray(kind.matrix(functions.shared, one, 1))
    for j in range(8):
        expected = functions.shared["kernel_1"][:, j] * (1 + one["columns_1"][:, j % 4])
        np.testing.assert_allclose(matrix[:, j], expected, rtol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "sine"])
@pytest.mark.parametrize("weight_update", ["low_rank", "normalize", "scale"])
def test_values_are_the_papers(make_functions, reference, activation, weight_update):
    # A low omega: SIREN's 30 on unit-norm columns would amplify float32's rounding beyond use.
    kind = dataclasses.replace(SMALL, activation=activation, weight_update=weight_update, omega=2.0)
    functions = make_functions(kind, 2, (3, 5))
    found = evaluate(functions, jnp.asarray(pixel_grid(3, 5)), jnp.asarray(pixel_cell(3, 5)))
    expected = reference(functions, axis_coordinates(3), axis_coordinates(5))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-5)


@pytest.mark.parametrize("weight_update", ["low_rank", "scale"])
@pytest.mark.parametrize("activation", ["relu", "sine"])
def test_zero_columns_are_the_base_function(make_functions, activation, weight_update):
    kind = dataclasses.replace(SMALL, activation=activation, weight_update=weight_update)
    functions = make_functions(kind, 1, (4, 4))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), functions.per_image)
    for layer in range(kind.depth):
        np.testing.assert_array_equal(kind.matrix(functions.shared, zeros, layer), functions.shared[f"kernel_{layer}"])


def test_integrated_functions_read_waves_damped_by_the_footprint(make_functions):
    """A wave that counts for less is a row of the first matrix that counts for less."""
    kind = dataclasses.replace(SMALL, weight_update="scale")
    functions, cell = make_functions(kind, 2, (4, 4)), np.float32([0.3, 0.1])
    damping = np.tile(np.sinc(cell[:, None] / 2 * kind.frequencies).ravel(), 2)[:, None]
    damped = functions.shared | {"kernel_0": functions.shared["kernel_0"] * damping.astype(np.float32)}
    coords = jnp.asarray(pixel_grid(3, 5))
    found = evaluate(functions.replace(kind=dataclasses.replace(kind, integrated=True)), coords, jnp.asarray(cell))
    np.testing.assert_allclose(found, evaluate(functions.replace(shared=damped), coords, jnp.asarray(cell)), atol=1e-5)
    assert np.abs(found - evaluate(functions, coords, jnp.asarray(cell))).max() > 1e-2


@pytest.mark.parametrize("activation", ["relu", "sine"])
def test_the_base_is_drawn_as_its_sources_draw_it(activation):
    """Kaiming-uniform (a = sqrt 5), or SIREN's, whose first layer's phases span omega; low ranks keep the variance."""
    kind = dataclasses.replace(SMALL, width=64, groups=16, activation=activation, weight_update="low_rank")
    shared = jax.tree.map(np.asarray, kind.init_shared(jax.random.key(0)))
    for layer, (fan_in, _) in enumerate(kind.layer_sizes):
        bound = fan_in**-0.5 if activation == "relu" else math.sqrt(6 / fan_in) / 30 if layer else 1 / fan_in
        kernel, bias, factor = (shared[f"{name}_{layer}"] for name in ("kernel", "bias", "factor"))
        assert np.abs(kernel).max() == pytest.approx(bound, rel=0.05) and np.abs(bias).max() <= bound
        assert bias.any() == (activation == "relu") and not np.isin(bias[bias != 0], kernel).any()
        if layer == 1:  # of 16 ranks, drawn apart from the kernel
            assert factor.std() == pytest.approx(1 / 4, rel=0.1)
            assert abs(np.corrcoef(factor.ravel(), kernel[:16].ravel())[0, 1]) < 0.1


def test_a_batch_is_the_loop_over_its_images(make_functions):
    functions = make_functions(SMALL, 3, (4, 5))
    coords, cell = jnp.asarray(pixel_grid(4, 5)), jnp.asarray(pixel_cell(4, 5))
    batch = evaluate(functions, coords, cell)
    for image in range(3):
        one = jax.tree.map(lambda x, i=image: x[i], functions.per_image)
        np.testing.assert_allclose(batch[image], SMALL.evaluate(functions.shared, one, coords, cell), atol=1e-6)
    np.testing.assert_allclose(evaluate(functions[1:], coords, cell), batch[1:], atol=1e-6)
    with pytest.raises(TypeError, match="found index 1, expected a slice"):
        functions[1]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from _equations(getattr(value, "jaxpr", value))


def test_features_are_float32_and_computed_once_per_grid(make_functions):
    kind = dataclasses.replace(SMALL, dtype="bfloat16")
    functions = make_functions(kind, 5, (4, 4))
    coords = jnp.asarray(pixel_grid(4, 4))
    equations = list(
        _equations(jax.make_jaxpr(image_function.evaluate)(functions, coords, jnp.asarray(pixel_cell(4, 4))).jaxpr)
    )
    cosines = [e.outvars[0].aval for e in equations if e.primitive.name == "cos"]
    assert [(c.shape, c.dtype) for c in cosines] == [((16, 2 * kind.bands), jnp.float32)]  # no batch of 5
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert products and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in products)


def test_the_phases_of_sine_functions_are_not_rounded(make_functions):
    kind = dataclasses.replace(SMALL, activation="sine", dtype="bfloat16")
    functions = make_functions(kind, 1, (4, 4))
    jaxpr = jax.make_jaxpr(image_function.evaluate)(
        functions, jnp.asarray(pixel_grid(4, 4)), jnp.asarray(pixel_cell(4, 4))
    )
    first, *others = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert first.invars[0].aval.dtype == jnp.float32
    assert first.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert all(e.invars[0].aval.dtype == jnp.bfloat16 for e in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 5}, "found 5 groups for 8 columns"),
        ({"activation": "tanh"}, "found activation='tanh', expected one of"),
        ({"weight_update": "add"}, "found weight_update='add', expected one of"),
        ({"depth": 1}, "found an image function of depth 1"),
        ({"groups": 0}, "found width 8, bands 3, groups 0, cutoff 4.0, expected positive ones"),
        ({"bands": 0}, "bands 0, .*expected positive ones"),
        ({"cutoff": math.nan}, "cutoff nan, expected positive ones"),
    ],
)
def test_functions_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


def test_the_native_term_on_its_own_grid_is_exact(make_functions):
    functions = make_functions(SMALL, 2, (5, 7), native=True)
    coords, cell = jnp.asarray(pixel_grid(5, 7)), jnp.asarray(pixel_cell(5, 7))
    native = functions.native
    bare = native.replace(skip=jnp.ones(2), out=jnp.zeros(2))
    found = evaluate(functions.replace(native=bare), coords, cell).reshape(2, 5, 7, 3)
    np.testing.assert_array_equal(found, native.noisy)  # resampling at the samples repeats them bit for bit
    raw = evaluate(functions.replace(native=None), coords, cell).reshape(2, 5, 7, 3)
    expected = native.skip[:, None, None, None] * native.noisy + native.out[:, None, None, None] * raw
    # The compiler may fuse a product with the sum: one rounding apart.
    np.testing.assert_allclose(evaluate(functions, coords, cell).reshape(2, 5, 7, 3), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", [1, 31, 1000])
def test_lanczos_is_one_hot_at_the_samples(size):
    coords = jnp.asarray(axis_coordinates(size), jnp.float32)
    np.testing.assert_array_equal(lanczos_weights(coords, jnp.float32(2 / size), size), np.eye(size))


@pytest.mark.parametrize("points", [5, 37])
def test_lanczos_reproduces_constants(points):
    coords = jnp.asarray(axis_coordinates(points), jnp.float32)
    weights = lanczos_weights(coords, jnp.float32(2 / points), 16)
    np.testing.assert_allclose(weights @ np.ones(16), 1, atol=1e-6)


def test_lanczos_is_the_papers_near_a_sample_too(lanczos):
    """Snapping to a sample from as far as a thousandth of a pixel would show in multi-step samples."""
    coords = axis_coordinates(16)[4:12] + 8e-4 * 2 / 16
    found = lanczos_weights(jnp.asarray(coords, jnp.float32), jnp.float32(2 / 16), 16)
    np.testing.assert_allclose(found, lanczos(coords, 2 / 16, 16), atol=1e-5)


def test_rematerialised_equals_plain_in_values_and_gradients(make_functions):
    functions = make_functions(SMALL, 2, (5, 7), native=True)
    coords, cell = jnp.asarray(pixel_grid(5, 7)), jnp.asarray(pixel_cell(5, 7))
    target = jax.random.normal(jax.random.key(9), (2, 35, 3))

    def loss(chunk, trained):
        shared, per_image = trained
        values = evaluate_rematerialised(
            functions.replace(shared=shared, per_image=per_image), coords, cell, chunk=chunk
        )
        return jnp.mean((values - target) ** 2), values

    trained = functions.shared, functions.per_image
    run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, plain), plain_gradients = run(35, trained)
    (_, chunked), gradients = run(8, trained)  # 35 is no multiple of 8
    np.testing.assert_allclose(chunked, plain, atol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    names = {e.primitive.name for e in _equations(jax.make_jaxpr(lambda t: loss(8, t)[0])(trained).jaxpr)}
    assert names & {"checkpoint", "remat", "remat2"}
