import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.noise import NoiseRange
from fid_imagegen.diffusion.preconditioning import (
    PRECONDITIONINGS,
    c_in,
    c_noise,
    c_skip,
    consistency_function,
    preconditioning,
)

NOISE = NoiseRange()
SIGMA = jnp.asarray([0.002, 0.5, 0.821, 80.0])


def images(seed, batch=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, 3, 5, 2)), jnp.float32)


def test_reference_values():
    np.testing.assert_allclose(c_skip(SIGMA, NOISE), [1, 0.502004, 0.271515, 3.9e-5], rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(c_skip(SIGMA, NOISE)[:3], [1, 0.502004, 0.271515], atol=1e-6)
    out = preconditioning("edm").c_out(SIGMA, NOISE)
    np.testing.assert_allclose(out, [0, 0.352139, 0.425999, 0.499978], atol=2e-6)
    np.testing.assert_allclose(c_in(SIGMA, NOISE), [1.99998, 1.414214, 1.04029, 0.0125], rtol=3e-5)
    np.testing.assert_allclose(c_noise(SIGMA, NOISE)[jnp.asarray([0, 3])], [-1.5537, 1.0955], atol=5e-5)


def test_x0_blend_weighs_the_image_by_the_rest():
    out = preconditioning("x0_blend").c_out(SIGMA, NOISE)
    np.testing.assert_allclose(out, 1 - c_skip(SIGMA, NOISE), atol=1e-6)
    # Near sigma_min 1 - c_skip cancels to nothing in float32; c_out must not.
    near = preconditioning("x0_blend").c_out(jnp.float32(0.0021), NOISE)
    assert near == pytest.approx(4e-8, rel=0.01)


@pytest.mark.parametrize("name", ["edm", "x0_blend"])
def test_the_boundary_condition_is_exact(name):
    x, raw = images(0), 1e3 * images(1)
    found = consistency_function(
        lambda *_, key: raw, x, jnp.full(4, NOISE.sigma_min), None, key=None, noise=NOISE, form=preconditioning(name)
    )
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize(("name", "scale"), [("edm", 0.5), ("x0_blend", 1.0), ("mean_flow", 1.0)])
def test_clean_scale_is_what_the_output_counts_for_in_pure_noise(name, scale):
    form = preconditioning(name)
    assert form.clean_scale(NOISE) == scale
    assert form.c_out(jnp.float32(80), NOISE) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("name", ["edm", "x0_blend"])
def test_the_network_sees_unit_variance_and_the_level(name):
    seen = {}

    def net(x, levels_BK, cond, *, key):
        seen.update(x=x, levels=levels_BK, cond=cond, key=key)
        return jnp.ones_like(x)

    x, form = images(2), preconditioning(name)
    found = consistency_function(net, x, SIGMA, "cond", key="key", noise=NOISE, form=form)
    np.testing.assert_allclose(seen["x"], x / jnp.sqrt(SIGMA**2 + 0.25)[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(seen["levels"], jnp.log(SIGMA)[:, None] / 4, rtol=1e-6)
    assert (seen["cond"], seen["key"]) == ("cond", "key")
    skip, out = (v[:, None, None, None] for v in (c_skip(SIGMA, NOISE), form.c_out(SIGMA, NOISE)))
    np.testing.assert_allclose(found, skip * x + out, rtol=1e-6)


def test_edm_has_unit_targets():
    """EDM chose c_out so that the network's target has unit variance; CM's differs only within sigma_min of the boundary."""
    sigma = jnp.asarray([0.05, 0.5, 5.0])
    noise = NoiseRange(sigma_min=1e-6)
    skip, out = c_skip(sigma, noise), preconditioning("edm").c_out(sigma, noise)
    variance = ((1 - skip) ** 2 * 0.25 + skip**2 * sigma**2) / out**2
    np.testing.assert_allclose(variance, 1, rtol=1e-3)


def test_mean_flow_is_a_jump_to_the_end_of_a_straight_path():
    """z = (1 - t) x0 + t e for t = sigma / (1 + sigma); f = z - t u, u = (z - G) / max(t, 0.05), is G wherever t >= 0.05."""
    sigma, x, raw, seen = jnp.asarray([0.002, 0.03, 0.5, 80.0]), images(3), images(4), {}

    def net(z, levels_BK, cond, *, key):
        seen.update(z=z, levels=levels_BK)
        return raw

    found = consistency_function(net, x, sigma, None, key=None, noise=NOISE, form=preconditioning("mean_flow"))
    t = np.asarray(sigma / (1 + sigma))[:, None, None, None]
    z = (1 - t) * x  # the path at t is the noisy image x0 + sigma e, shrunk
    np.testing.assert_allclose(seen["z"], z, rtol=1e-5)
    np.testing.assert_allclose(seen["levels"], np.repeat(t[:, :, 0, 0], 2, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found, z - t * (z - raw) / np.maximum(t, 0.05), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2:], raw[2:], rtol=1e-5)


def test_the_angle_is_trigflows():
    found = preconditioning("edm", "angle").levels(jnp.asarray([80.0, 0.821, 0.5]), NOISE)
    np.testing.assert_allclose(found[:, 0], [1.564546, 1.0238, np.pi / 4], atol=5e-5)


def test_unknown_names_list_the_known():
    with pytest.raises(
        ValueError, match="found preconditioning 'trig', expected one of .'edm', 'mean_flow', 'x0_blend'."
    ):
        preconditioning("trig")
    with pytest.raises(ValueError, match="found time 'flow', expected one of .'angle', 'log'.; change config.time"):
        preconditioning("edm", "flow")


def test_everything_is_differentiable_at_the_boundary():
    for form in PRECONDITIONINGS.values():
        total = lambda s, f=form: f.c_out(s, NOISE) + f.c_skip(s, NOISE) + f.levels(s, NOISE).sum()  # noqa: E731
        assert np.isfinite(jax.grad(total)(jnp.float32(0.002)))
