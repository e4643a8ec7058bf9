import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.noise import (
    NoiseRange,
    ct_levels,
    ct_target_decay,
    example_keys,
    example_normal,
    ict_levels,
    karras_cell,
    karras_sigma,
    lognormal_sigmas,
)

NOISE = NoiseRange()
FRACTIONS = (0, 0.01, 0.1, 0.25, 0.5, 1)


def test_karras_levels():
    expected = [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.4009, 5.3152, 3.2568]
    expected += [1.9233, 1.0882, 0.5853, 0.2964, 0.1395, 0.0599, 0.0229, 0.0075, 0.002]
    found = karras_sigma(jnp.arange(18.0), 18, NOISE)
    np.testing.assert_allclose(found, expected, atol=5e-4, rtol=1e-3)
    np.testing.assert_allclose(found[-1], 0.002, rtol=1e-5)
    assert (jnp.diff(karras_sigma(jnp.arange(1281.0), 1281, NOISE)) < 0).all()  # the weight's difference


@pytest.mark.parametrize(
    ("s1", "mu0", "levels", "decays"),
    [
        (150, 0.9, [2, 16, 48, 76, 107, 151], [0.81, 0.98605, 0.99553, 0.99719, 0.99801, 0.99860]),
        (200, 0.95, [2, 21, 64, 101, 143, 201], [0.9025, 0.99488, 0.99837, 0.99897, 0.99928, 0.99949]),
    ],
)
def test_ct_curriculum(s1, mu0, levels, decays):
    total = 800_000
    steps = jnp.asarray([int(f * total) for f in FRACTIONS])
    np.testing.assert_array_equal(ct_levels(steps, total, 2, s1), levels)
    # The released code's N(k) - 1; the paper's N(k) would give 0.9 at the start.
    np.testing.assert_allclose(ct_target_decay(steps, total, 2, s1, mu0), decays, atol=5e-6)


def test_ict_curriculum():
    steps = [0, 49_999, 50_000, 150_000, 349_999, 350_000, 399_999]
    found = ict_levels(jnp.asarray(steps), 400_000, 10, 1280)
    np.testing.assert_array_equal(found, [11, 11, 21, 81, 641, 1281, 1281])
    # s1 / s0 no power of two: K' = floor(1000 / (log2(12) + 1)) = 218, and 120 levels at the end and not 160.
    found = ict_levels(jnp.asarray([0, 217, 218, 3 * 218, 4 * 218]), 1000, 10, 120)
    np.testing.assert_array_equal(found, [11, 11, 21, 81, 121])


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_lognormal_levels():
    sigma = np.asarray(lognormal_sigmas(keys(20_000), -1.1, 2.0, NOISE), np.float64)
    assert sigma.min() >= np.float32(0.002) and sigma.max() <= 80
    z = np.linspace((math.log(0.002) + 1.1) / 2, (math.log(80) + 1.1) / 2, 10_001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    mean = density @ z
    assert np.log(sigma).mean() == pytest.approx(-1.1 + 2 * mean, abs=0.03)
    assert np.log(sigma).std() == pytest.approx(2 * math.sqrt(density @ (z - mean) ** 2), rel=0.02)


@pytest.mark.parametrize("count", [2, 11, 1281])
def test_a_level_lies_in_its_cell(count):
    sigma = lognormal_sigmas(keys(4000), -1.1, 2.0, NOISE)
    cell = karras_cell(sigma, count, NOISE)
    assert cell.min() >= 0 and cell.max() <= count - 2
    above, below = karras_sigma(cell.astype(float), count, NOISE), karras_sigma(cell + 1.0, count, NOISE)
    slack = 1e-3 * (above - below)
    assert (above + slack >= sigma).all() and (sigma >= below - slack).all()
    ends = karras_cell(jnp.asarray([80.0, 0.002]), count, NOISE)
    np.testing.assert_array_equal(ends, [0, count - 2])


def test_cells_follow_icts_probabilities():
    count, draws = 11, 20_000
    cell = karras_cell(lognormal_sigmas(keys(draws), -1.1, 2.0, NOISE), count, NOISE)
    grid = np.asarray(karras_sigma(jnp.arange(float(count)), count, NOISE), np.float64)
    erf = np.asarray([math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in grid])
    p = (erf[:-1] - erf[1:]) / (erf[0] - erf[-1])
    found = np.bincount(cell, minlength=count - 1)
    assert ((found - draws * p) ** 2 / (draws * p)).sum() < 30  # chi-square, 9 degrees: 1 in 2,300


def test_noise_belongs_to_the_row():
    key, rows = jax.random.key(3), jnp.arange(6)
    whole = example_normal(example_keys(key, rows), (2, 3))
    np.testing.assert_array_equal(example_normal(example_keys(key, rows[2:5]), (2, 3)), whole[2:5])
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize(
    "fields", [{"sigma_min": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"sigma_data": -1.0}, {"sigma_max": math.nan}]
)
def test_ranges_that_cannot_be(fields):
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max and sigma_data > 0; change config.noise"):
        NoiseRange(**fields)
