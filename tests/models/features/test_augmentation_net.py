import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.features.augmentation_net import AugmentationNet, feature_distance


def images(seed, count=3):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def net():
    model = AugmentationNet(labels=13, widths=(8, 16))
    return jax.jit(functools.partial(model.apply, jax.jit(model.init)(jax.random.key(0), images(0))))


def test_maps_lie_behind_the_pools_and_images_do_not_meet(net):
    logits, maps = net(images(0))
    assert logits.shape == (3, 13) and [x.shape for x in maps] == [(3, 4, 4, 8), (3, 2, 2, 16)]
    alone, _ = net(images(0)[:1])
    np.testing.assert_allclose(alone, logits[:1], atol=1e-5)


def stand_in(x):
    return jnp.mean(x, axis=(1, 2)), [x, 3 * x[:, ::2, ::2]]


def test_the_distance_is_a_norm_of_each_feature_over_positions():
    a, b = (jnp.asarray(np.random.default_rng(seed).standard_normal((2, 4, 4, 3)), jnp.float32) for seed in (0, 1))
    d = np.asarray(a - b)
    expected = np.sqrt((d**2).sum(axis=(1, 2))).sum(axis=-1) + np.abs(d.mean(axis=(1, 2))).sum(axis=-1)
    expected += 3 * np.sqrt((d[:, ::2, ::2] ** 2).sum(axis=(1, 2))).sum(axis=-1)
    np.testing.assert_allclose(feature_distance(stand_in, a, b), expected, rtol=1e-4)
    np.testing.assert_array_equal(jax.grad(lambda x: feature_distance(stand_in, x, a).sum())(a), 0)


def test_the_distance_is_a_distance(net):
    measure = jax.jit(functools.partial(feature_distance, net))
    a, b, c = (images(seed) for seed in range(3))
    ab, ba, ac, cb = measure(a, b), measure(b, a), measure(a, c), measure(c, b)
    np.testing.assert_array_equal(measure(a, a), 0)
    np.testing.assert_allclose(ab, ba, rtol=1e-6)
    assert (ab > 0.1).all() and (ab <= ac + cb).all()
    gradient = jax.jit(jax.grad(lambda x: measure(x, a).sum()))
    # Where the images are equal it is rounding, seen through `smooth`.
    assert np.isfinite(gradient(a)).all() and np.isfinite(gradient(b)).all() and np.abs(gradient(b)).max() > 0


def test_images_too_small_for_the_pools():
    with pytest.raises(ValueError, match="found images .1, 4, 4, 1., expected sides of at least 8 .*use fewer widths"):
        jax.eval_shape(AugmentationNet(13, (8, 8, 8)).init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
