import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.distances import DISTANCES, l2, laplacian, pseudo_huber, unit_gradient


def pair(size, channels=3, scale=1.0):
    generator = np.random.default_rng(size)
    a, b = (jnp.asarray(generator.standard_normal((2, size, size, channels)), jnp.float32) for _ in range(2))
    return a, a + scale * b


@pytest.mark.parametrize(("size", "c"), [(32, 0.02993), (64, 0.05986), (128, 0.11972), (256, 0.23944)])
def test_pseudo_huber_acts_on_the_norm_of_the_whole_image(size, c):
    a = jnp.zeros((1, size, size, 3))
    b = a.at[0, 1, 2, 0].set(3 * c).at[0, 0, 0, 1].set(4 * c)  # norm 5 c, by two elements
    assert pseudo_huber(a, b)[0] == pytest.approx((26**0.5 - 1) * c, rel=1e-3)


def test_pseudo_huber_far_away_is_the_norm():
    a, b = pair(8)
    norm = np.linalg.norm(np.asarray(a - b).reshape(2, -1), axis=1)
    np.testing.assert_allclose(pseudo_huber(a, b, factor=0.0), norm, rtol=1e-5)
    np.testing.assert_allclose(pseudo_huber(a, b), norm, rtol=1e-2)


def test_l2_is_a_mean():
    a, b = pair(4)
    np.testing.assert_allclose(l2(a, b), ((np.asarray(a) - np.asarray(b)) ** 2).reshape(2, -1).mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_images_have_no_distance_and_a_finite_gradient(name):
    a, _ = pair(4)
    assert np.abs(DISTANCES[name](a, a)).max() < 1e-8
    assert not jax.grad(lambda x: DISTANCES[name](x, a).sum())(a).any()


def test_a_unit_gradient_is_ayts_step():
    a, b = pair(4)
    aligned, weight = unit_gradient(laplacian), jnp.asarray([2.0, 7.0])
    np.testing.assert_array_equal(aligned(a, b), laplacian(a, b))
    ours, theirs = jax.grad(lambda a, b: (weight * aligned(a, b)).sum(), argnums=(0, 1))(a, b)
    raw = jax.grad(lambda a: laplacian(a, b).sum())(a)
    target = a - raw / jnp.linalg.norm(raw.reshape(2, -1), axis=1)[:, None, None, None]
    step = jax.grad(lambda a: (weight * ((a - target) ** 2).sum(axis=(1, 2, 3)) / 2).sum())(a)
    np.testing.assert_allclose(ours, step, atol=1e-5)
    assert not theirs.any()
    np.testing.assert_array_equal(jax.grad(lambda x: aligned(x, a).sum())(a), 0)


def test_laplacian_weighs_every_band_alike():
    flat, fine = jnp.full((1, 8, 8, 1), 0.3), jnp.asarray(np.indices((8, 8)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
    coarse = jnp.repeat(jnp.repeat(fine[:, :4, :4], 2, axis=1), 2, axis=2)
    zero = jnp.zeros((1, 8, 8, 1))
    for picture, expected in ((flat, 0.3), (fine, 1.0), (coarse, 1.0), (0.5 * fine - 0.2 * coarse - flat, 1.0)):
        np.testing.assert_allclose(DISTANCES["laplacian"](picture, zero), [expected], rtol=1e-6)
