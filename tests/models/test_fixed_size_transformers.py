"""What every Transformer of one fixed size does, DiT or U-ViT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.dit import DiT
from fid_imagegen.models.layers import BlockStyle
from fid_imagegen.models.uvit import UViT

MODELS = {
    "dit": DiT(channels=3, patch=2, width=16, heads=2, depth=2, num_classes=3, style=BlockStyle(qk_norm=True)),
    "uvit": UViT(image_size=(4, 6), channels=3, patch=2, width=16, heads=2, depth=4, num_classes=3, qk_norm=True),
}
LEVELS = jnp.asarray([[-1.0], [0.7]])
LABELS = jnp.asarray([2, 0])
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def trained(model):
    """Every parameter moved, those that start at zero too."""
    params = jax.jit(model.init)(jax.random.key(0), IMAGES, LEVELS, LABELS)["params"]
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * generator.standard_normal(x.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def call(model, trained):
    return jax.jit(lambda x, levels=LEVELS, labels=LABELS: model.apply({"params": trained}, x, levels, labels))


def test_images_do_not_mix(call):
    np.testing.assert_allclose(call(IMAGES)[1:], call(IMAGES[1:], LEVELS[1:], LABELS[1:]), atol=1e-5)


def test_level_label_and_null_class_change_the_output(call):
    outputs = [call(IMAGES), call(IMAGES, LEVELS + 0.2)]
    outputs += [call(IMAGES, labels=jnp.full(2, label)) for label in (1, 3)]
    assert np.isfinite(outputs).all()
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-2 for other in outputs[:i])


def test_the_jvp_is_the_finite_difference(model, trained):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), trained)
        double = model.clone(dtype=jnp.float64, level_scale=2.0)
        run = jax.jit(lambda x, level: double.apply({"params": wide}, x, level, LABELS))
        point = (jnp.asarray(IMAGES, jnp.float64), jnp.asarray(LEVELS, jnp.float64))
        for direction in ((jnp.cos(point[0]), 0 * point[1]), (0 * point[0], jnp.asarray([[1.0], [-0.5]]))):
            tangent = jax.jvp(run, point, direction)[1]
            step = 1e-5
            ends = [run(*(a + sign * step * b for a, b in zip(point, direction, strict=True))) for sign in (1, -1)]
            assert tangent.dtype == jnp.float64 and np.abs(tangent).max() > 0.1
            np.testing.assert_allclose(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


def test_dropout_follows_its_key(model, trained):
    dropping = model.clone(dropout=0.5)
    given = {"params": trained}, IMAGES, LEVELS, LABELS
    run = jax.jit(lambda key: dropping.apply(*given, deterministic=False, rngs={"dropout": key}))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-2


def test_bfloat16_computes_with_float32_parameters(model, trained, call):
    half = model.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), IMAGES, LEVELS, LABELS)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(lambda p: half.apply({"params": p}, IMAGES, LEVELS, LABELS))(trained))
    tokens = 6 if isinstance(model, DiT) else 8  # U-ViT's level and label are tokens too
    assert f"bf16[2,{tokens},64]" in text  # the MLP's hidden layer
    found, normal = jax.jit(half.apply)({"params": trained}, IMAGES, LEVELS, LABELS), call(IMAGES)
    assert found.dtype == jnp.float32 and 0 < np.abs(found - normal).max() < 0.1 * np.abs(normal).max()
