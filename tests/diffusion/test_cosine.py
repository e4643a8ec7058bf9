import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.cosine import (
    DEFAULT_STAGE_C_TIMESTEPS,
    add_noise,
    alpha_bar,
    ddpm_step,
    keyed_noise,
    p2_weight,
    sample,
    sample_step,
    sampling_times,
    training_times,
)
from fid_imagegen.diffusion.noise import example_keys

SHAPE = (3, 2, 4)
REFERENCE = {
    0: 0.9999,
    0.25: 0.847012,
    0.5: 0.493844,
    2 / 3: 0.246448,
    0.75: 0.144272,
    0.9: 0.024092,
    0.99: 0.000243,
    1: 0.0001,
}


def normals(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2, *SHAPE))


def predict(x, t_B):
    """About the noise in x_t of data of unit variance, and not linear."""
    return jnp.sin(np.pi / 2 * t_B[:, None, None, None]) * x + 0.1 * jnp.tanh(x)


def test_alpha_bar_has_the_reference_values():
    for t, expected in REFERENCE.items():
        assert float(alpha_bar(jnp.asarray(t, jnp.float32))) == pytest.approx(expected, abs=6e-7)
    t = np.linspace(0, 1, 999, dtype=np.float32)
    single = alpha_bar(jnp.asarray(t))
    with jax.enable_x64(True):
        exact = alpha_bar(jnp.asarray(t, jnp.float64))
    np.testing.assert_allclose(single, exact, rtol=2e-6)  # near t = 1 too, where the cosine itself would lose digits
    assert np.all(np.diff(exact) <= 0)


def test_training_times_are_uniform_with_a_share_at_one():
    keys = example_keys(jax.random.key(0), jnp.arange(40_000))
    t_B = np.asarray(training_times(keys))
    assert t_B.min() >= 0.001 and t_B.max() == 1
    assert np.mean(t_B == 1) == pytest.approx(0.075, abs=0.005)
    np.testing.assert_allclose(np.quantile(t_B, [0.25, 0.5]), [0.271, 0.541], atol=0.01)
    np.testing.assert_array_equal(training_times(keys[7:9]), t_B[7:9])  # a slice of the batch draws the same levels


def test_p2_weight_is_that_of_the_code():
    t_B = jnp.linspace(0, 1, 9)
    signal = alpha_bar(t_B)
    np.testing.assert_allclose(p2_weight(t_B), 1 / (1 + signal / (1 - signal)), rtol=1e-4)


def test_timesteps():
    np.testing.assert_allclose(sampling_times(4), [1, 0.75, 0.5, 0.25, 0])
    assert len(DEFAULT_STAGE_C_TIMESTEPS) == 30 and np.all(np.diff(DEFAULT_STAGE_C_TIMESTEPS) < 0)
    np.testing.assert_allclose(
        DEFAULT_STAGE_C_TIMESTEPS[[0, 1, 19, 20, -1]], [1, 1 - 1 / 57, 2 / 3, 0.6, 0], atol=1e-12
    )
    with pytest.raises(ValueError, match="found 0 sampling steps"):
        sampling_times(0)


def test_steps_know_the_path():
    """With the true noise, DDPM has the posterior's mean and variance."""
    x0, eps = jnp.asarray(normals(2), jnp.float32)
    t_B, next_B = jnp.asarray([0.9, 0.4]), jnp.asarray([0.7, 0.0])
    x = add_noise(x0, eps, t_B)
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)
    mean = ddpm_step(x, eps, t_B, next_B, zero)
    signal, following = (np.asarray(alpha_bar(t), np.float64)[:, None, None, None] for t in (t_B, next_B))
    kept = signal / following
    expected = np.sqrt(following) * (1 - kept) * x0 + np.sqrt(kept) * (1 - following) * x  # DDPM eq. 7
    np.testing.assert_allclose(mean, expected / (1 - signal), atol=2e-5)
    deviation = np.sqrt((1 - kept) * (1 - following) / (1 - signal))
    deviation[1] = 0  # the last step adds no noise
    np.testing.assert_allclose(ddpm_step(x, eps, t_B, next_B, one) - mean, deviation * one, atol=1e-6)


def test_a_scan_of_steps_equals_the_loop_and_an_image_its_batch():
    keys = example_keys(jax.random.key(1), jnp.arange(3))
    times = sampling_times(5)

    @jax.jit
    def run(keys):
        noise = keyed_noise(keys, SHAPE)
        return sample(predict, ddpm_step, noise(0), times, noise)

    noise = keyed_noise(keys, SHAPE)
    x = noise(0)
    for i in range(1, 6):
        x = sample_step(predict, ddpm_step, x, times[i - 1], times[i], noise(i))
    np.testing.assert_allclose(run(keys), x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(keys[1:2]), x[1:2], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff([noise(i) for i in range(6)], axis=0)).max(axis=(1, 2, 3, 4)).min() > 0.5


@pytest.fixture
def scheduler():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DDPMWuerstchenScheduler()


def torch_trajectory(scheduler, monkeypatch, x, times, noises, dtype):
    """diffusers' scheduler, unchanged but for the noise it draws: x after every step."""
    import torch
    from diffusers.schedulers import scheduling_ddpm_wuerstchen as module

    drawn = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(drawn)).to(dtype))
    scheduler.set_timesteps(timesteps=torch.from_numpy(np.array(times)).to(dtype))
    x, found = torch.from_numpy(x).to(dtype), []
    for t in scheduler.timesteps[:-1]:
        t_B = t.expand(x.shape[0])
        eps = torch.sin(np.pi / 2 * t_B[:, None, None, None]) * x + 0.1 * torch.tanh(x)
        x = scheduler.step(eps, t_B, x).prev_sample
        found.append(x.double().numpy())
    return np.stack(found)


def in_float64(scheduler):
    """The scheduler with its constants in float64: as it ships, s = 0.008 and the cosine of it are float32 tensors."""
    import torch

    scheduler.s = torch.tensor([0.008], dtype=torch.float64)
    scheduler._init_alpha_cumprod = torch.cos(scheduler.s / (1 + scheduler.s) * torch.pi * 0.5) ** 2
    return scheduler


def our_trajectory(x, times, noises, dtype):
    x, found = jnp.asarray(x, dtype), []
    for i in range(1, len(times)):
        t, t_next = (jnp.asarray(times[k], dtype) for k in (i - 1, i))
        x = sample_step(predict, ddpm_step, x, t, t_next, jnp.asarray(noises[i - 1], dtype))
        found.append(np.asarray(x, np.float64))
    return np.stack(found)


@pytest.mark.parity
@pytest.mark.parametrize("times", [sampling_times(60), sampling_times(12), DEFAULT_STAGE_C_TIMESTEPS], ids=len)
def test_trajectories_are_those_of_diffusers(scheduler, monkeypatch, times):
    import torch

    x, *noises = normals(len(times))
    run = lambda scheduler, dtype: torch_trajectory(scheduler, monkeypatch, x, times, noises, dtype)  # noqa: E731
    single, double = run(scheduler, torch.float32), run(scheduler, torch.float64)
    exact = run(in_float64(scheduler), torch.float64)
    with jax.enable_x64(True):
        ours64 = our_trajectory(x, times, noises, jnp.float64)
        listed = jnp.asarray(noises)
        scanned = sample(predict, ddpm_step, jnp.asarray(x), times, lambda i: listed[i - 1])
    ours32 = our_trajectory(x, times, noises, jnp.float32)
    gap = lambda a, b: np.abs(a - b).max() / np.abs(exact).max()  # noqa: E731
    print(
        f"\n{len(times) - 1} steps, relative to the largest value: float64 {gap(ours64, double):.1e} "
        f"({gap(ours64, exact):.1e} with the scheduler's constants in float64), float32 {gap(ours32, single):.1e}; "
        f"float32 against float64: torch's own {gap(single, double):.1e}, ours {gap(ours32, ours64):.1e}"
    )
    assert np.abs(exact).max() > 1
    assert gap(ours64, exact) <= 1e-12 and gap(ours64, double) <= 1e-6 and gap(ours32, single) <= 1e-4
    np.testing.assert_allclose(scanned, ours64[-1], atol=1e-12)


@pytest.mark.parity
def test_added_noise_is_that_of_diffusers(scheduler):
    import torch

    scheduler = in_float64(scheduler)
    x0, eps = normals(2)
    t_B = np.array([0.3, 0.95])
    theirs = scheduler.add_noise(*(torch.from_numpy(a) for a in (x0, eps, t_B))).numpy()
    with jax.enable_x64(True):
        np.testing.assert_allclose(add_noise(*(jnp.asarray(a) for a in (x0, eps, t_B))), theirs, atol=1e-12)
