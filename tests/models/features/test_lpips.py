import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.features import lpips, vgg16
from fid_imagegen.models.features.lpips import LPIPS, SCALE, SHIFT, lpips_distance
from fid_imagegen.models.features.vgg16 import VGG16

distance = jax.jit(lpips_distance, static_argnames="resize_to")


def total(params, a, b):
    return lpips_distance(params, a, b, resize_to=None).sum()


gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
forward = jax.jit(lambda params, a, b, tangent: jax.jvp(lambda a: total(params, a, b), (a,), (tangent,))[1])


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Eight channels per stage: these identities do not depend on the width, the parity test has the true one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lpips, vgg16):
            patch.setattr(module, "STAGES", tuple((8, convolutions) for _, convolutions in vgg16.STAGES))
        yield


@pytest.fixture(scope="module")
def params(narrow):
    image, rng = jnp.zeros((1, 16, 16, 3)), np.random.default_rng(0)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]

    def fill(x):  # He-scaled kernels; biases and heads positive, so that no pixel is dead
        return rng.uniform(0, 1, x.shape) if x.ndim == 1 else rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape)

    return jax.tree.map(lambda x: jnp.asarray(fill(x), jnp.float32), shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 2, 16, 16, 3), minval=-1.0)


def test_zero_for_equal_images_symmetric_and_per_pair(params, images):
    a, b = images
    d = distance(params, a, b, resize_to=None)
    assert d.shape == (2,) and d.dtype == jnp.float32
    assert distance(params, a, a, resize_to=None).max() < 1e-12 * d.min()
    np.testing.assert_allclose(distance(params, b, a, resize_to=None), d, rtol=1e-5)
    np.testing.assert_allclose(distance(params, a[::-1], b[::-1], resize_to=None), d[::-1], rtol=1e-5)


def test_is_equation_1_of_the_paper(params, images):
    activations = jax.jit(lambda x: VGG16().apply({"params": params["vgg16"]}, (x - np.array(SHIFT)) / np.array(SCALE)))
    expected = 0
    for layer, (x, y) in enumerate(zip(*map(activations, images), strict=True)):
        x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (np.float64(x), np.float64(y)))
        expected = expected + (np.asarray(params[f"lin{layer}"]) * (x - y) ** 2).sum(-1).mean((1, 2))
    np.testing.assert_allclose(distance(params, *images, resize_to=None), expected, rtol=1e-4)


def test_grey_images_are_repeated_to_three_channels(params, images):
    grey = images[..., :1]
    np.testing.assert_allclose(
        distance(params, *grey, resize_to=None),
        distance(params, *jnp.repeat(grey, 3, axis=-1), resize_to=None),
        rtol=1e-5,
    )


def bilinear(x, size):
    """Half-pixel centres, clamped edges, no antialiasing: F.interpolate(mode="bilinear", align_corners=False)."""
    for axis in (1, 2):
        n = x.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(position).astype(int)
        weight = np.expand_dims(position - low, (1,) if axis == 2 else (1, 2))
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, np.minimum(low + 1, n - 1), axis) * weight
    return x.astype(np.float32)


@pytest.mark.parametrize("size", [24, 36])  # below and above 32 px: only the first tells antialiasing apart
def test_resize_is_bilinear_without_antialiasing(params, size):
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 1, 32, 32, 3)).astype(np.float32)
    expected = distance(params, bilinear(a, size), bilinear(b, size), resize_to=None)
    np.testing.assert_allclose(distance(params, a, b, resize_to=size), expected, rtol=1e-4)


def test_gradients_reach_images_and_not_weights(params, images):
    weights, a, b = gradients(params, *images)
    assert not any(x.any() for x in jax.tree.leaves(weights))
    assert a.any() and b.any()
    tangent = jax.random.normal(jax.random.key(2), a.shape)
    np.testing.assert_allclose(forward(params, *images, tangent), jnp.vdot(a, tangent), rtol=1e-4)


def test_derivatives_are_zero_where_all_channels_are_dead(params, images):
    dead = jax.tree.map_with_path(lambda path, x: x - 1e3 if path[-1].key == "bias" else x, params)
    _, a, b = gradients(dead, *images)
    assert not a.any() and not b.any()  # NaN counts as true
    assert forward(dead, *images, images[1]) == 0


def test_refuses_what_is_not_a_pair_of_float_images(params, images):
    a, b = images
    with pytest.raises(ValueError, match="pair the images"):
        lpips_distance(params, a, b[:1])
    with pytest.raises(ValueError, match="expected floats"):
        lpips_distance(params, a, (b * 127).astype(jnp.uint8))
