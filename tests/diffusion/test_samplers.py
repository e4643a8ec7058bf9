import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.noise import NoiseRange
from fid_imagegen.diffusion.preconditioning import consistency_function, flow_map, per_image, preconditioning
from fid_imagegen.diffusion.samplers import consistency_input, flow_input, heun_input, sampling_sigmas

# A large sigma_min, so that sqrt(next^2 - min^2) is far from next.
NOISE = NoiseRange(sigma_min=0.5, sigma_max=80.0)
KEYS = jax.random.split(jax.random.key(0), 40)
SHAPE = (8, 8, 2)


def test_levels_of_a_sample():
    np.testing.assert_allclose(sampling_sigmas(1, NOISE), [80])
    np.testing.assert_allclose(sampling_sigmas(2, NOISE), [80, 0.821])
    np.testing.assert_allclose(sampling_sigmas(3, NOISE), [80, (80 * 0.821) ** 0.5, 0.821])
    np.testing.assert_allclose(sampling_sigmas(3, NoiseRange(sigma_max=0.7)), 0.7)  # never noisier than the start
    with pytest.raises(ValueError, match="found 0 sampling steps, expected at least 1"):
        sampling_sigmas(0, NOISE)
    assert sampling_sigmas(1, NoiseRange(sigma_min=1.0)) == 80
    with pytest.raises(
        ValueError, match="found 2 sampling steps and sigma_min 1.0, expected one below the last level, 0.821"
    ):
        sampling_sigmas(2, NoiseRange(sigma_min=1.0))


def test_one_step_starts_from_pure_noise():
    x, sigma = consistency_input(None, KEYS, SHAPE, steps=1, noise=NOISE)
    assert x.shape == (40, *SHAPE) and float(x.std()) == pytest.approx(80, rel=0.03)
    np.testing.assert_array_equal(sigma, np.full(40, 80))


def test_later_steps_add_the_noise_that_is_missing():
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return jnp.full_like(x, 7.0)

    x, sigma = consistency_input(denoise, KEYS, SHAPE, steps=3, noise=NOISE)
    middle = (80 * 0.821) ** 0.5
    np.testing.assert_allclose([s[0] for _, s in seen] + [sigma[0]], [80, middle, 0.821], rtol=1e-6)
    for noisy, level in ((seen[1][0], middle), (x, 0.821)):
        assert float(noisy.mean()) == pytest.approx(7, abs=0.3)
        assert float(noisy.std()) == pytest.approx((level**2 - 0.5**2) ** 0.5, rel=0.03)
    # Fresh noise every time, and unlike the first.
    draws = np.stack([np.ravel(v - v.mean()) for v in (seen[0][0], seen[1][0], x)])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.05


def test_a_sample_depends_on_its_own_key():
    denoise = lambda x, sigma: x / sigma[:, None, None, None]  # noqa: E731
    whole, _ = consistency_input(denoise, KEYS[:5], SHAPE, steps=2, noise=NOISE)
    part, _ = consistency_input(denoise, KEYS[2:5], SHAPE, steps=2, noise=NOISE)
    np.testing.assert_allclose(part, whole[2:], rtol=1e-6)


def test_heun_goes_from_pure_noise_to_the_smallest_level():
    """Of N(0, s^2) the denoiser is x s^2 / (s^2 + sigma^2), and its paths are straight to where sqrt(s^2 + sigma^2) says."""
    s = 0.5
    denoise = lambda x, sigma: x * (s**2 / (s**2 + sigma**2))[:, None, None, None]  # noqa: E731
    start, sigma = heun_input(None, KEYS, SHAPE, steps=1, noise=NOISE)
    assert float(start.std()) == pytest.approx(80, rel=0.03)
    np.testing.assert_array_equal(sigma, np.full(40, 80))
    x, sigma = heun_input(denoise, KEYS, SHAPE, steps=40, noise=NOISE)
    np.testing.assert_allclose(sigma, np.full(40, 0.5), rtol=1e-5)
    np.testing.assert_allclose(x, start * ((s**2 + 0.5**2) / (s**2 + 80**2)) ** 0.5, rtol=1e-2)
    # By the boundary condition a net answers its input at the smallest level: of one image nothing is left but that.
    boundary = lambda x, sigma: jnp.where(sigma[:, None, None, None] > 0.51, 0.3, x)  # noqa: E731
    x, _ = heun_input(boundary, KEYS, SHAPE, steps=4, noise=NOISE)
    np.testing.assert_allclose(x, 0.3 + 0.5 * (start - 0.3) / 80, atol=1e-4)
    with pytest.raises(ValueError, match="found 0 sampling steps, expected at least 1"):
        heun_input(denoise, KEYS, SHAPE, steps=0, noise=NOISE)


def gaussian_flow(x, levels_BK, cond, *, key):
    """The clean image by which a network says the exact mean velocity of N(0, 0.3^2), whose paths grow as its deviation."""
    t, r = levels_BK[:, 0], levels_BK[:, 0] - levels_BK[:, 1]
    deviation = lambda t: jnp.sqrt((1 - t) ** 2 * 0.3**2 + t**2)  # noqa: E731
    # Where nothing is left of the way the velocity is that of the place.
    slope = (t - (1 - t) * 0.3**2) / deviation(t) ** 2
    u = jnp.where(t > r, (1 - deviation(r) / deviation(t)) / jnp.where(t > r, t - r, 1), slope)
    return x - per_image(jnp.maximum(t, 0.05) * u) * x


def flow(form="mean_flow", net=gaussian_flow):
    """denoise(x, sigma[, lower]) of a net."""
    common = {"cond": None, "key": None, "noise": NOISE, "form": preconditioning(form)}
    return lambda x, *levels: (flow_map if levels[1:] else consistency_function)(net, x, *levels, **common)


@pytest.mark.parametrize(
    "steps", [1, 2, 3, 7, 30]
)  # the last of 30 is from below t = 0.05, where velocities are bounded
def test_any_number_of_exact_mean_velocities_is_the_exact_flow(steps):
    with jax.enable_x64(True):
        start, _ = flow_input(None, KEYS, SHAPE, steps=1, noise=NOISE)
        x, sigma = flow_input(flow(), KEYS, SHAPE, steps=steps, noise=NOISE)
        t = 80 / 81 / steps
        np.testing.assert_allclose(sigma, np.full(40, t / (1 - t)), rtol=1e-6)
        end = start * 0.3 / np.sqrt(0.3**2 + 80**2)
        np.testing.assert_allclose(flow()(x, sigma), end, rtol=1e-10)
        # On the way too: the jump to a level is two jumps to it.
        level = lambda value: jnp.full(40, value)  # noqa: E731
        by_way = flow()(flow()(start, level(80.0), level(3.0)), level(3.0), level(0.1))
        np.testing.assert_allclose(by_way, flow()(start, level(80.0), level(0.1)), rtol=1e-10)
        np.testing.assert_allclose(flow()(start, level(80.0), level(0.0)), flow()(start, level(80.0)), rtol=1e-10)


def test_one_step_along_a_flow_is_one_of_consistency():
    flowed, jumped = (make(None, KEYS, SHAPE, steps=1, noise=NOISE) for make in (flow_input, consistency_input))
    for found, expected in zip(flowed, jumped, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_steps_along_a_flow_are_even_in_time_and_without_noise():
    asked = []

    def denoise(x, sigma_B, lower_B):
        asked.append((sigma_B, lower_B))
        return 0.5 * x

    x, sigma = flow_input(denoise, KEYS, SHAPE, steps=4, noise=NOISE)
    time = lambda sigma: np.asarray(sigma / (1 + sigma))[0]  # noqa: E731
    ends = 80 / 81 * np.asarray([1, 0.75, 0.5, 0.25])
    found = [[time(level) for level in pair] for pair in asked]
    np.testing.assert_allclose(found, np.stack([ends[:-1], ends[1:]], axis=1), rtol=1e-5)
    assert time(sigma) == pytest.approx(ends[-1], rel=1e-5)
    np.testing.assert_array_equal(x, flow_input(None, KEYS, SHAPE, steps=1, noise=NOISE)[0] / 8)


def test_flows_that_cannot_be():
    with pytest.raises(ValueError, match="found a network that is told one level, expected one of form 'mean_flow'"):
        flow_input(flow("edm"), KEYS, SHAPE, steps=2, noise=NOISE)
    with pytest.raises(ValueError, match="found 0 sampling steps, expected at least 1"):
        flow_input(flow(), KEYS, SHAPE, steps=0, noise=NOISE)
