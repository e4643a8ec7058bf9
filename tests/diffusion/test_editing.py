import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion import editing
from fid_imagegen.diffusion.noise import NoiseRange

NOISE = NoiseRange()
KEYS = jax.random.split(jax.random.key(0), 3)
X, Y = (jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (3, 4, 6, 3)), jnp.float32) for seed in (0, 1))
MASK = np.tile([1.0, 0.0, 1.0], (4, 2)).astype(np.float32)
PROJECTIONS = {
    "inpainting": editing.inpainting(MASK),
    "colourisation": editing.colourisation(),
    "super_resolution": editing.super_resolution(2),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_projections(name):
    """P P = P, <P x, y> = <x, P y>; what is replaced has the known part of one image and the rest of the other."""
    project = PROJECTIONS[name]
    np.testing.assert_allclose(project(project(X)), project(X), atol=1e-6)
    np.testing.assert_allclose(jnp.sum(project(X) * Y), jnp.sum(X * project(Y)), rtol=1e-4)
    mixed = editing.replaced(X, project(Y), project)
    np.testing.assert_allclose(project(mixed), project(Y), atol=1e-6)
    np.testing.assert_allclose(mixed - project(mixed), X - project(X), atol=1e-6)
    assert np.abs(mixed - X).max() > 0.1 and np.abs(mixed - Y).max() > 0.1


def test_what_is_known():
    np.testing.assert_array_equal(PROJECTIONS["inpainting"](X)[:, :, 1], 0)
    np.testing.assert_array_equal(PROJECTIONS["inpainting"](X)[:, :, 0], X[:, :, 0])
    means = PROJECTIONS["super_resolution"](X)
    np.testing.assert_allclose(means[:, 2, 5], X[:, 2:, 4:].mean(axis=(1, 2)), atol=1e-6)
    luma = X @ np.array([0.2989, 0.5870, 0.1140])
    grey = jnp.repeat(luma[..., None], 3, axis=-1)
    np.testing.assert_allclose(PROJECTIONS["colourisation"](grey), PROJECTIONS["colourisation"](X), atol=1e-3)


def test_every_step_sees_the_known_part_under_its_noise():
    seen, noise = [], NoiseRange(sigma_min=0.7, sigma_max=8.0)  # sqrt(level^2 - min^2) is far from the level

    def denoise(x, sigma):
        jax.debug.callback(lambda x, sigma: seen.append((x, sigma)), x, sigma, ordered=True)
        return jnp.full_like(x, 9.0)

    known = PROJECTIONS["inpainting"](Y)
    many = jnp.tile(known, (40, 8, 8, 1))
    project = editing.inpainting(np.tile(MASK, (8, 8)))
    x, sigma = editing.edit_input(
        denoise, many, project, jax.random.split(jax.random.key(1), 120), steps=4, noise=noise
    )
    jax.effects_barrier()
    levels = [float(s[0]) for _, s in seen] + [float(sigma[0])]
    assert len(levels) == 4 and levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(8)
    assert levels[-1] == pytest.approx(0.821)  # where the image function still is most of f
    inside, added = np.tile(MASK, (8, 8))[None, :, :, None] == 1, []
    for number, (noisy, level) in enumerate(zip([*(noisy for noisy, _ in seen), x], levels, strict=True)):
        # At the start nothing stands where nothing is known.
        left = np.asarray(noisy) - np.asarray(many) - np.where(inside | (number == 0), 0, 9)
        assert left.mean() == pytest.approx(0, abs=0.01 * level)
        assert left.std() == pytest.approx((level**2 - 0.49 * (number > 0)) ** 0.5, rel=0.005)
        assert np.mean(left * many) == pytest.approx(0, abs=0.005 * level)  # it is on the known part, and on all of it
        added.append(left.ravel())
    assert np.abs(np.corrcoef(added) - np.eye(4)).max() < 0.01  # fresh at every step


def test_an_edit_depends_on_its_own_key():
    project = PROJECTIONS["colourisation"]
    run = lambda part: editing.edit_input(  # noqa: E731
        lambda x, sigma: x / sigma[:, None, None, None], project(X)[part], project, KEYS[part], steps=3, noise=NOISE
    )
    np.testing.assert_allclose(run(slice(1, 3))[0], run(slice(3))[0][1:], rtol=1e-6, atol=1e-6)


def test_one_step_is_of_pure_noise():
    x, sigma = editing.edit_input(lambda x, sigma: x, 0 * X, PROJECTIONS["inpainting"], KEYS, steps=1, noise=NOISE)
    assert float(sigma[0]) == pytest.approx(80) and float(x.std()) == pytest.approx(80, rel=0.2)
    with pytest.raises(ValueError, match="found 0 sampling steps"):
        editing.edit_input(None, X, PROJECTIONS["inpainting"], KEYS, steps=0, noise=NOISE)
