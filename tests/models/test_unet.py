import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.unets import layers
from fid_imagegen.models.unets.adm import ADM
from fid_imagegen.models.unets.presets import build_unet
from fid_imagegen.models.unets.score import ScoreBlock, ScoreUNet

SCORE = {"channels": 2, "stem": 8, "widths": (8, 12), "blocks": 1, "attention_levels": (1,), "resampling": "box"}
TINY = {
    "ddpmpp": ScoreUNet(**SCORE, progressive_input=False, fourier_scale=None),
    "ncsnpp": ScoreUNet(**SCORE | {"resampling": "fir"}, progressive_input=True, fourier_scale=0.02),
    "adm": ADM(2, widths=(8, 12), blocks=1, attention_levels=(1,), head_width=4, groups=4, level_scale=1.0),
}
models = pytest.mark.parametrize("model", TINY.values(), ids=TINY)


def abstract(model, size=(4, 6)):
    image = jax.ShapeDtypeStruct((2, *size, model.channels), jnp.float32)
    level, label = jax.ShapeDtypeStruct((2, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), image, level, label)


def random_params(model):
    """All weights drawn: of those at initialisation half are zeros."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return (generator.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree.map(draw, abstract(model))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((2, 4, 6, 2)).astype(np.float32)


LEVELS = np.asarray([[-1.0], [0.5]], np.float32)


@pytest.mark.parametrize(
    ("preset", "num_classes", "size", "count", "published"),
    [
        ("ddpmpp_32", 0, 32, 55_732_739, "55.73"),
        ("ddpmpp_64", 0, 64, 61_804_419, "61.80"),
        ("ncsnpp_32", 0, 32, 56_395_523, "56.40"),
        ("ncsnpp_64", 0, 64, 62_758_787, "62.76"),  # the released settings; this count is ours
        ("adm_64", 0, 64, 295_131_267, "295.1"),
        ("adm_64", 1000, 64, 295_899_267, "295.9"),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, num_classes, size, count, published):
    shapes = abstract(build_unet(preset, channels=3, num_classes=num_classes), (size, size))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    assert f"{count / 1e6:.{len(published.split('.')[1])}f}" == published


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="found U-Net 'ddpm', expected one of .*adm_64.*ddpmpp_32"):
        build_unet("ddpm", channels=3)


@models
def test_zero_at_initialisation_and_not_after(model, x):
    out, variables = jax.jit(model.init_with_output)(jax.random.key(0), x, LEVELS)
    assert out.shape == x.shape and not np.any(out)
    assert variables.keys() == {"params"}
    trained = jax.jit(model.apply)(random_params(model), x, LEVELS)
    assert trained.shape == x.shape and np.all(np.std(trained, axis=(1, 2)) > 1e-3)


@models
def test_inputs_that_do_not_fit_are_refused(model, x):
    with pytest.raises(ValueError, match="found images of 5x6, expected multiples of 2; pad or crop"):
        abstract(model, (5, 6))
    with pytest.raises(
        ValueError, match=r"found no labels, expected one of 0\.\.3 for each image, the last for none; give"
    ):
        jax.eval_shape(model.clone(num_classes=3).init, jax.random.key(0), x, LEVELS)
    with pytest.raises(ValueError, match="found width 12 with 5 heads, expected a multiple"):
        layers.SelfAttention(5, 4, 1e-5, layers.ZEROS, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 2, 2, 12)))


@pytest.mark.parametrize("head_width", [64, 5])
def test_heads_fill_the_width(head_width):
    with pytest.raises(ValueError, match=f"found width [0-9]+ with heads {head_width} wide, expected a multiple"):
        abstract(TINY["adm"].clone(head_width=head_width), (4, 4))


@models
def test_tangents_are_finite_differences(model, x):
    """In the image and in the level, in float64."""
    with jax.enable_x64(True):
        params = random_params(model)
        generator, step = np.random.default_rng(2), 1e-5
        x, level = x.astype(np.float64), LEVELS.astype(np.float64)
        run = jax.jit(functools.partial(model.clone(dtype=jnp.float64).apply, params))
        tangents = jax.jit(lambda primal, tangent: jax.jvp(run, primal, tangent)[1])
        for dx, dlevel in [(generator.standard_normal(x.shape), 0 * level), (0 * x, np.asarray([[1.0], [-2.0]]))]:
            tangent = tangents((x, level), (dx, dlevel))
            ahead, behind = run(x + step * dx, level + step * dlevel), run(x - step * dx, level - step * dlevel)
            assert np.abs(tangent).max() > 1e-3
            np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), atol=1e-7 * np.abs(tangent).max())


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
def test_labels_and_dropout(name, x):
    model = TINY[name].clone(num_classes=3, dropout=0.5)
    params = random_params(model)
    run = jax.jit(functools.partial(model.apply, params))
    first, second = run(x, LEVELS, np.asarray([0, 2])), run(x, LEVELS, np.asarray([1, 2]))
    assert np.abs(first - second)[0].max() > 1e-3
    np.testing.assert_array_equal(first[1], second[1])
    # The null class is the network without classes.
    none = run(x, LEVELS, np.asarray([3, 3]))
    assert np.abs(none - first).max() > 1e-3
    if name == "adm":  # the other's classes have a bias that the null class has too
        bare = {key: leaf for key, leaf in params["params"].items() if key != "class_embedding"}
        np.testing.assert_allclose(none, TINY[name].apply({"params": bare}, x, LEVELS), atol=1e-5)

    train = jax.jit(
        lambda key: model.apply(params, x, LEVELS, np.asarray([0, 2]), deterministic=False, rngs={"dropout": key})
    )
    one, other = train(jax.random.key(0)), train(jax.random.key(1))
    np.testing.assert_array_equal(one, train(jax.random.key(0)))
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - first).max() > 1e-3


@pytest.mark.parametrize("name", ["ncsnpp", pytest.param("adm", marks=pytest.mark.slow)])
def test_remat_changes_nothing(name, x):
    def gradient(model):
        def loss(params):
            out = model.apply(params, x, LEVELS, deterministic=False, rngs={"dropout": jax.random.key(0)})
            return jnp.sum(out**2)

        return loss

    plain, remat = (TINY[name].clone(dropout=0.5, remat=remat) for remat in (False, True))
    params = random_params(plain)
    assert jax.tree.structure(params) == jax.tree.structure(abstract(remat))
    assert "remat" in str(jax.make_jaxpr(gradient(remat))(params))
    expected, found = (jax.jit(jax.value_and_grad(gradient(model)))(params) for model in (plain, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@models
def test_bfloat16_computes_and_float32_remembers(model, x):
    half = model.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(half))} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(half.apply)(random_params(model), x, LEVELS))
    assert ":bf16[2,4,6,8] = conv_general_dilated" in text and not re.search(r":f32\S* = conv_general_dilated", text)
    # Attention's logits are wide, and its softmax.
    assert re.search(r":f32\[2,\d,6,6\] = dot_general", text) and not re.search(r":bf16\S* = exp ", text)
    assert jax.eval_shape(half.apply, abstract(half), x, LEVELS).dtype == jnp.float32


def fir_by_hand(image, positions):
    """The filter [1, 3, 3, 1] / 8 over both axes at left ends `positions` of an axis, zeros outside, in float64."""
    taps = np.asarray([1, 3, 3, 1]) / 8

    def along(rows):
        take = lambda i: rows[i] if 0 <= i < len(rows) else 0 * rows[0]  # noqa: E731
        return np.stack([sum(taps[k] * take(start + k) for k in range(4)) for start in positions(len(rows))])

    return along(along(image).swapaxes(0, 1)).swapaxes(0, 1)


def test_fir_resampling_is_its_definition(x):
    image = x[0].astype(np.float64)
    zeros_between = np.zeros((8, 12, 2))
    zeros_between[::2, ::2] = 4 * image
    for found, expected in [
        (layers.fir_down(x), fir_by_hand(image, lambda n: range(-1, n - 1, 2))),
        (layers.fir_blur(x), fir_by_hand(image, lambda n: range(-2, n - 1))),
        (layers.fir_up(x), fir_by_hand(zeros_between, lambda n: range(-2, n - 2))),
    ]:
        np.testing.assert_allclose(found[0], expected, atol=1e-6)
    constant = jnp.ones((1, 8, 8, 3))
    np.testing.assert_allclose(layers.fir_down(layers.fir_up(constant))[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(layers.fir_blur(x)[:, 1::2, 1::2], layers.fir_down(x), atol=1e-6)


def test_box_resampling_is_its_definition(x):
    np.testing.assert_allclose(layers.box_down(layers.box_up(x)), x, rtol=1e-6)
    np.testing.assert_allclose(layers.box_down(x)[0, 1, 2], x[0, 2:, 4:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(layers.box_up(x)[:, 2:4, 6:8], np.tile(x[:, 1:2, 3:4], (1, 2, 2, 1)))


def test_level_features():
    with_last, without = (layers.sin_cos_frequencies(64, endpoint=endpoint) for endpoint in (True, False))
    np.testing.assert_allclose(with_last, 10000.0 ** -(np.arange(64) / 63))
    np.testing.assert_allclose(without, 10000.0 ** -(np.arange(64) / 64))
    fourier = layers.fourier_frequencies(20_000, scale=16.0)
    assert np.std(fourier) == pytest.approx(2 * np.pi * 16, rel=0.02)
    np.testing.assert_array_equal(fourier, layers.fourier_frequencies(20_000, scale=16.0))
    features = layers.level_features(jnp.asarray([[0.5]]), np.asarray([1.0, 3.0]))
    np.testing.assert_allclose(features[0], [np.cos(0.5), np.cos(1.5), np.sin(0.5), np.sin(1.5)], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_the_score_networks_written_out(name, x):
    """Which block takes what: the two levels of the tiny network, line by line."""
    model = TINY[name]
    params = random_params(model)["params"]
    sin_cos, fourier = layers.sin_cos_frequencies(4, endpoint=True), layers.fourier_frequencies(8, 0.02)
    condition = layers.level_features(jnp.asarray(LEVELS), fourier if name == "ncsnpp" else sin_cos)
    for where in ("level_0", "level_1"):
        condition = jax.nn.silu(condition @ params[where]["kernel"] + params[where]["bias"])

    def block(where, *inputs, to, resample=None, attention=False):
        made = ScoreBlock(to, resample, attention, model.resampling, 0.0, jnp.float32)
        return made.apply({"params": params[where]}, jnp.concatenate(inputs, -1), condition, True)

    def convolve(where, x, stride=1, padding="SAME"):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel, bias = params[where]["kernel"], params[where]["bias"]
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers) + bias

    @jax.jit
    def run(x):
        stem = convolve("conv_in", x)
        fine = block("down_0_0", stem, to=8)
        halved = block("down_1_resample", fine, to=8, resample="down")
        if name == "ncsnpp":
            halved = (halved + convolve("pyramid_1", layers.fir_blur(x), 2, "VALID")) / math.sqrt(2)
        coarse = block("down_1_0", halved, to=12, attention=True)
        h = block("mid_1", block("mid_0", coarse, to=12, attention=True), to=12)
        h = block("up_1_1", block("up_1_0", h, coarse, to=12), halved, to=12, attention=True)
        h = block("up_0_resample", h, to=12, resample="up")
        h = block("up_0_1", block("up_0_0", h, fine, to=8), stem, to=8)
        h = jax.nn.standardize(h.reshape(2, 24, 2, 4), axis=(1, 3), epsilon=1e-6).reshape(h.shape)  # two groups
        h = h * params["norm_out"]["scale"] + params["norm_out"]["bias"]
        return convolve("conv_out", jax.nn.silu(h))

    expected = run(x)
    found = jax.jit(model.apply)({"params": params}, x, LEVELS)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
