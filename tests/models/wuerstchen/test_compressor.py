from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.wuerstchen.compressor import (
    COMPRESSORS,
    ConvCompressor,
    EfficientNetCompressor,
    LatentHead,
    build_compressor,
)
from fid_imagegen.models.wuerstchen.efficientnet import Block, EfficientNetV2Features, Spec, Stage
from fid_imagegen.models.wuerstchen.previewer import Previewer

SMALL = Spec(  # every kind of block, stride 32
    8, (Stage(True, 1, 8, 2, 2), Stage(True, 4, 16, 1, 2), Stage(False, 4, 16, 1, 2), Stage(False, 4, 16, 2, 2)), 24
)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


def initialised(model, images):
    """(output in evaluation, variables)"""
    return jax.jit(lambda key: model.init_with_output(key, images, train=False))(jax.random.key(1))


@pytest.mark.parametrize(
    ("variant", "parameters", "statistics"), [("s", 20_177_488, 153_872), ("l", 117_234_272, 512_576)]
)
def test_features_have_the_published_parameters(variant, parameters, statistics):
    variables = abstract(EfficientNetV2Features(variant), (1, 64, 64, 3))
    assert size(variables["params"]) == parameters and size(variables["batch_stats"]) == statistics


@pytest.mark.parametrize(("pixels", "positions"), [(384, 12), (768, 24), (786, 25)])
def test_the_published_compressor_has_the_published_latents(pixels, positions):
    model = EfficientNetCompressor()
    latents, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)), train=False)
    )
    assert latents.shape == (1, positions, positions, 16) and model.stride == 32
    assert size(variables["params"]["mapper"]) == 1280 * 16 + 2 * 16


def test_the_backbone_sees_images_under_imagenets_normalisation():
    model = EfficientNetCompressor(SMALL, 4)
    images = jax.random.uniform(jax.random.key(0), (1, 64, 32, 3))
    latents, variables = initialised(model, images)
    part = lambda name: {kind: tree[name] for kind, tree in variables.items()}  # noqa: E731
    evaluate = lambda model, variables, x: jax.jit(partial(model.apply, train=False))(variables, x)  # noqa: E731
    normalised = (np.asarray(images) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    features = evaluate(EfficientNetV2Features(SMALL), part("backbone"), normalised.astype(np.float32))
    expected = evaluate(LatentHead(4), part("mapper"), features)
    assert np.abs(latents - expected).max() < 1e-4 * np.abs(expected).max()


def test_residuals_are_dropped_by_image_in_training_alone():
    block, x = Block(True, 1, 8, 1, drop_rate=0.5), jax.random.normal(jax.random.key(0), (32, 4, 4, 8))
    variables = block.init(jax.random.key(1), x, train=False)
    same = lambda a, b: np.isclose(a, b, rtol=1e-4, atol=1e-5).all((1, 2, 3))  # noqa: E731

    def train(rate, key):
        changed = Block(True, 1, 8, 1, drop_rate=rate)
        return changed.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    residual = train(0.0, jax.random.key(2)) - x
    dropped = train(0.5, jax.random.key(2))
    gone, kept = same(dropped, x), same(dropped, x + 2 * residual)
    assert np.all(gone ^ kept) and 4 <= gone.sum() <= 28
    np.testing.assert_array_equal(dropped, train(0.5, jax.random.key(2)))
    assert not same(dropped, train(0.5, jax.random.key(3))).all()
    evaluated = block.apply(variables, x, train=False)  # takes no rng
    np.testing.assert_array_equal(evaluated, Block(True, 1, 8, 1, drop_rate=0.0).apply(variables, x, train=False))


def test_drop_rates_grow_over_the_blocks_from_zero(monkeypatch):
    rates = []
    original = Block.__call__
    monkeypatch.setattr(
        Block, "__call__", lambda self, x, train: rates.append(self.drop_rate) or original(self, x, train)
    )
    abstract(EfficientNetV2Features(SMALL, drop_rate=0.6), (1, 32, 32, 3))
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    "model",
    [
        EfficientNetCompressor(SMALL, 5),
        ConvCompressor(16, (4, 6, 8, 8), 5),
        ConvCompressor(4, (4, 6), 5, dtype=jnp.bfloat16),
    ],
    ids=["efficientnet", "conv", "conv-half"],
)
def test_compressors_share_their_interface(model):
    images = jax.random.uniform(jax.random.key(0), (2, 33, 64, 3))
    evaluated, variables = initialised(model, images)
    assert evaluated.shape == (2, -(-33 // model.stride), 64 // model.stride, 5) and evaluated.dtype == jnp.float32
    rngs = {"dropout": jax.random.key(2)}
    train = jax.jit(lambda v: model.apply(v, images, train=True, rngs=rngs, mutable=["batch_stats"]))
    latents, updated = train(variables)
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=5e-2)
    changed = jax.tree.map(
        lambda a, b: bool(np.any(np.not_equal(a, b))), updated["batch_stats"], variables["batch_stats"]
    )
    assert jax.tree.all(changed)


def test_the_table_builds_every_compressor():
    fields = {"conv": {"stride": 16, "widths": (8, 8, 8, 8)}}
    for name in COMPRESSORS:
        model = build_compressor(name, **fields.get(name, {}))
        assert model.channels == 16 and model.stride in (16, 32)
    with pytest.raises(ValueError, match=r"'dino'.*'conv', 'efficientnet_v2_l', 'efficientnet_v2_s'"):
        build_compressor("dino")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"found 2 widths for stride 16.*give 4 widths or stride 4"):
        abstract(ConvCompressor(16, (4, 4)), (1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"'m'.*\['l', 's'\]"):
        abstract(EfficientNetCompressor("m"), (1, 32, 32, 3))


def test_the_previewer_has_the_published_parameters_and_size():
    model = Previewer()
    image, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 24, 30, 16)), train=False)
    )
    assert size(variables["params"]) == 3_979_651
    assert image.shape == (1, 192, 240, 3)


def test_a_small_previewer_learns_a_picture_of_its_latents():
    model = Previewer((8, 8, 4))
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
    variables = initialised(model, latents)[1]
    target = jax.random.uniform(jax.random.key(2), (2, 16, 24, 3))

    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        images, updated = model.apply(variables, latents, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(images - target)), updated["batch_stats"]

    @jax.jit
    def step(params, stats):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), stats, value

    params, stats = variables["params"], variables["batch_stats"]
    values = []
    for _ in range(40):
        params, stats, value = step(params, stats)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
