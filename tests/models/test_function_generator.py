import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.function_generator import PRESETS, FunctionGenerator, PatchEmbedding, function_kind
from fid_imagegen.models.function_predictors import FunctionPredictor

KIND = CoordinateMLP(channels=3, width=8, depth=3, bands=2, groups=4, cutoff=4.0)
MODEL = FunctionGenerator(
    kind=KIND, image_size=8, patch=4, width=16, heads=2, extractor_depth=2, predictor_depth=3, num_classes=3
)
LABELS = jnp.asarray([2, 0])
LEVELS = jnp.asarray([[-1.0], [0.7]])


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(MODEL.init)(jax.random.key(0), images, LEVELS, LABELS)["params"]


@pytest.fixture(scope="module")
def trained(params):
    """Every parameter moved, the gates too."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * generator.standard_normal(x.shape), jnp.float32), params)


@jax.jit
def call(params, x, levels=LEVELS, labels=LABELS):
    return MODEL.apply({"params": params}, x, levels, labels).per_image


def reconstruct(params, x):
    return MODEL.apply({"params": params}, x, method=MODEL.reconstruct).per_image


def same(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def distance(a, b):
    return max(np.abs(np.subtract(x, y)).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# At 64 px, patch 4, RGB, unconditional: (all, predictor with the shared function).
PARAMETERS = {
    ("tiny", None): (1_905_683, 662_675),
    ("S", None): (48_649_123, 16_464_163),
    ("B", None): (114_649_379, 38_609_699),
    ("L", None): (321_264_931, 107_872_291),
    ("tiny", "5x64"): (1_859_398, 616_390),
    ("S", "5x256"): (47_231_494, 15_046_534),
    ("B", "5x256"): (110_706_694, 34_667_014),
    ("L", "5x256"): (309_320_710, 95_928_070),
}


@pytest.mark.parametrize(("preset", "function"), PARAMETERS)
def test_parameters_of_the_presets(preset, function):
    sizes = PRESETS[preset] | ({"function": function} if function else {})
    kind = function_kind(sizes.pop("function"), channels=3, image_size=64, patch=4, cutoff="nyquist")
    model = FunctionGenerator(kind=kind, image_size=64, patch=4, **sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 1)))["params"]
    total, predictor = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes, [shapes["predictor"], shapes["function"]])
    )
    assert (total, predictor) == PARAMETERS[preset, function]
    assert predictor < total / 2  # as the paper says


def test_the_untrained_trunk_is_the_identity(params, trained, images):
    # A trained predictor behind an untrained trunk: the state in which consistency training starts.
    pretrained, alone = trained | {"extractor": params["extractor"]}, jax.jit(reconstruct)(trained, images)
    same(call(pretrained, images), alone, atol=1e-6)
    assert distance(call(trained, images), alone) > 1e-2


def test_level_and_label_reach_the_function(trained, images):
    made = call(trained, images)
    for other in (
        call(trained, images, levels=LEVELS + 0.2),
        call(trained, images, labels=LABELS * 0 + 1),
    ):
        assert distance(made, other) > 1e-3


def test_images_do_not_mix(trained, images):
    made = call(trained, images)
    alone = call(trained, images[1:], LEVELS[1:], LABELS[1:])
    same(jax.tree.map(lambda x: x[1:], made), alone, atol=1e-5)


def test_functions_have_the_kinds_shapes(trained, images):
    functions = jax.eval_shape(lambda: MODEL.apply({"params": trained}, images, LEVELS, LABELS))
    assert (functions.kind, functions.grid) == (KIND, (8, 8))
    for layer, ((fan_in, _), columns) in enumerate(zip(KIND.layer_sizes, KIND.columns, strict=True)):
        assert functions.per_image[f"columns_{layer}"].shape == (2, fan_in, columns)


@pytest.mark.parametrize("weight_update", ["low_rank", "scale"])
def test_heads_start_at_the_shared_function(images, weight_update):
    kind = dataclasses.replace(KIND, weight_update=weight_update)
    predictor = FunctionPredictor(kind, width=16, heads=2, depth=1, remat=False, unroll=False)
    features = images.reshape(2, 12, 16)
    made, params = jax.jit(predictor.init_with_output)(jax.random.key(0), features, jnp.zeros((2, 16)))
    assert not any(x.any() for x in jax.tree.leaves(made)) and params["params"]["head_0"]["kernel"].shape == (16, 8)


def test_blocks_are_stacked_whatever_the_program(params):
    for path, leaf in jax.tree.leaves_with_path(params):
        names = [key.key for key in path]
        if "blocks" in names:
            assert leaf.shape[0] == {"extractor": 2, "predictor": 3}[names[0]]
    for flags in ({"unroll": True}, {"remat": True}):
        shapes = jax.eval_shape(MODEL.clone(**flags).init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)), LEVELS, LABELS)
        assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    layers = params["extractor"]["blocks"]["attention"]["query"]["kernel"]
    assert not np.allclose(layers[0], layers[1])  # each drawn by itself


def test_flags_reach_both_stacks(trained, images):
    """That a rematerialised loop equals the scan is a test of `stack`."""

    def text(**flags):
        run = lambda p: MODEL.clone(**flags).apply({"params": p}, images, LEVELS, LABELS).per_image  # noqa: E731
        return str(jax.make_jaxpr(run)(trained))

    assert text().count("unroll=1") == 2
    assert "unroll=2" in text(unroll=True) and "unroll=3" in text(unroll=True)
    assert text().count("prevent_cse") == 0 and text(remat=True).count("prevent_cse") == 2


def test_dropout_follows_its_key(trained, images):
    model = MODEL.clone(dropout=0.5)

    @jax.jit
    def run(key):
        return model.apply(
            {"params": trained}, images, LEVELS, LABELS, deterministic=False, rngs={"dropout": key}
        ).per_image

    same(run(jax.random.key(0)), run(jax.random.key(0)))
    assert distance(run(jax.random.key(0)), run(jax.random.key(1))) > 1e-3


def test_bfloat16_computes_with_float32_parameters(images):
    model = MODEL.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, LEVELS, LABELS)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    made = jax.eval_shape(model.apply, shapes, images, LEVELS, LABELS)
    assert {x.dtype for x in jax.tree.leaves(made.per_image)} == {jnp.dtype("bfloat16")}


def test_patches_are_a_strided_convolution(images):
    module = PatchEmbedding(4, 8)
    params = module.init(jax.random.key(0), images)["params"]["project"]
    kernel = params["kernel"].reshape(4, 4, 3, 8)
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    silent = {"params": {"project": {"kernel": params["kernel"] * 0, "bias": params["bias"]}}}
    found = module.apply({"params": {"project": params}}, images) - module.apply(silent, images)
    np.testing.assert_allclose(found, convolved.reshape(2, 4, 8), atol=1e-5)


def test_a_size_that_no_patch_divides():
    with pytest.raises(ValueError, match="found image size 8 with patch 3, expected a multiple; change"):
        jax.eval_shape(MODEL.clone(patch=3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), LEVELS[:1], LABELS[:1])
