import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.targets import EDM, FORMS, form

SHAPE = (4, 3, 2)
# x0 returned by a last step: the cosine path ends at alpha_bar = 0.9999, not at 1.
LAST_STEP = {"eps_ab": 2e-3, "eps_ab_sigmoid": 2e-3, "v": 2e-3, "flow": 1e-5, "edm": 1e-4, "edm_paper": 1e-4}
# Where sigma_data is 1, it could be left out unseen.
# Jumps are steps of consistency functions, not of denoisers: tests/tasks/test_stage_c_jumps.py.
LAWS = {name: law for name, law in FORMS.items() if name != "jump"}
LAWS |= {"edm_paper": EDM(NoiseRange(0.002, 80.0, 0.5), mean=-1.2, deviation=1.2)}
every_form = pytest.mark.parametrize("name", LAWS)


def per_image(t_B):
    return jnp.asarray(t_B)[:, None, None, None]


def draws(count, batch=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, batch, *SHAPE)), jnp.float32)


def output_for(name, target, x):
    """The (a, b) whose prediction at x is `target`, with b away from 0 and 1."""
    if not name.startswith("eps_ab"):
        return target, jnp.zeros_like(target)
    b = jnp.full_like(x, 0.3)
    divisor = 0.3 if name == "eps_ab_sigmoid" else 0.7 + 1e-5
    return x - divisor * target, b


@every_form
def test_a_perfect_output_has_no_loss_and_gives_x0_and_eps(name):
    law, (x0, eps, error) = LAWS[name], draws(3)
    t_B = jnp.asarray([0.05, 0.3, 0.5, 0.8, 0.95])
    x = law.add_noise(x0, eps, t_B)
    output = output_for(name, law.target(x0, eps, t_B), x)
    np.testing.assert_allclose(law.loss(output, x0, eps, t_B), 0, atol=1e-8)
    prediction = law.predict(output, x, t_B)
    # Noise is scarce at the low levels and the image at the high ones: float32 gives back what is there.
    np.testing.assert_allclose(law.to_x0(prediction, x, t_B), x0, atol=2e-4)
    np.testing.assert_allclose(law.to_eps(prediction, x, t_B), eps, atol=2e-4)
    # An error of the prediction is squared, averaged over each image and weighted.
    worse = output_for(name, law.target(x0, eps, t_B) + error, x)
    squares = np.mean(np.square(error), axis=(1, 2, 3))
    weights = 1 - cosine.alpha_bar(t_B) if name.startswith("eps_ab") else 1
    np.testing.assert_allclose(law.loss(worse, x0, eps, t_B), weights * squares, rtol=1e-4)


@every_form
def test_a_step_to_the_end_with_a_perfect_prediction_returns_x0(name):
    law, (x0, eps, noise) = LAWS[name], draws(3)
    t_B = jnp.asarray([0.05, 0.3, 0.5, 0.8, 0.9])
    x = law.add_noise(x0, eps, t_B)
    out = law.step(x, law.target(x0, eps, t_B), t_B, jnp.zeros(5), noise)
    np.testing.assert_allclose(out, x0, atol=LAST_STEP[name] * np.abs(x0).max())


@every_form
def test_a_step_along_the_path_keeps_x0(name):
    law, (x0, eps, _) = LAWS[name], draws(3)
    t_B, next_B = jnp.full(5, 0.8), jnp.full(5, 0.6)
    x = law.step(law.add_noise(x0, eps, t_B), law.target(x0, eps, t_B), t_B, next_B, jnp.zeros_like(x0))
    if name in ("flow", "edm", "edm_paper"):
        np.testing.assert_allclose(x, law.add_noise(x0, eps, next_B), rtol=1e-4, atol=1e-5)
    else:  # ancestral: part of the noise is drawn anew
        np.testing.assert_allclose(x, cosine.ddpm_step(law.add_noise(x0, eps, t_B), eps, t_B, next_B, 0 * x), atol=1e-5)


@every_form
def test_the_start_the_network_input_and_the_levels_are_in_range(name):
    law = LAWS[name]
    keys = example_keys(jax.random.key(0), jnp.arange(4000))
    t_B = law.times(keys)
    assert t_B.shape == (4000,) and t_B.min() >= 0 and t_B.max() <= 1 and np.std(t_B) > 0.05
    np.testing.assert_array_equal(law.times(keys[5:7]), t_B[5:7])
    x0, eps = draws(2, batch=4000)
    data = 0.5 if name == "edm_paper" else 1
    scaled = law.scale_input(law.add_noise(data * x0, eps, t_B), t_B)
    assert np.std(scaled) == pytest.approx(1, rel=0.02) or (name == "flow" and 0.7 < np.std(scaled) < 1)
    end = law.add_noise(x0, eps, jnp.ones(4000))
    assert np.std(end) == pytest.approx(law.initial_deviation, rel=0.02)


@pytest.mark.parametrize(("name", "data"), [("edm", 1.0), ("edm_paper", 0.5)])
def test_edm_levels_are_those_of_the_paper(name, data):
    law = LAWS[name]
    sigma = np.asarray(law.sigma(law.times(example_keys(jax.random.key(0), jnp.arange(4000)))), np.float64)
    assert np.mean(np.log(sigma * 0.5 / data)) == pytest.approx(-1.2, abs=0.06)
    assert np.std(np.log(sigma)) == pytest.approx(1.2, abs=0.05)
    np.testing.assert_allclose(law.sigma(jnp.asarray([1.0, 1e-7, 0.0])), [160 * data, 0.004 * data, 0], rtol=1e-4)
    x0, eps = draws(2, batch=3000)
    x0 = data * x0
    for t in (0.1, 0.5, 0.9):
        t_B = jnp.full(3000, t)
        x, F, s = law.add_noise(x0, eps, t_B), law.target(x0, eps, t_B), float(law.sigma(t_B)[0])
        assert np.std(F) == pytest.approx(1, rel=0.02)
        c_skip, c_out = data**2 / (s**2 + data**2), s * data / np.sqrt(s**2 + data**2)
        np.testing.assert_allclose(law.to_x0(F, x, t_B), c_skip * x + c_out * F, rtol=1e-4, atol=1e-4)


@every_form
def test_sampling_with_the_exact_denoiser_gives_the_data(name):
    """x0 ~ N(mean, deviation^2): E[x0 | x_t] is known, and so is the target's expectation; the samples have those moments."""
    law, mean, deviation, steps = LAWS[name], 0.6, 0.7, 400

    def denoised(x, t_B):
        """(E[x0 | x], E[eps | x]) on the path x = signal x0 + noise eps, whose two factors the form itself tells."""
        one, zero = jnp.ones_like(x), jnp.zeros_like(x)
        signal, noise = law.add_noise(one, zero, t_B), law.add_noise(zero, one, t_B)
        gain = signal * deviation**2 / (signal**2 * deviation**2 + noise**2)
        x0 = mean + gain * (x - signal * mean)
        return x0, (x - signal * x0) / noise

    def predict(x, t_B):
        return law.predict(output_for(name, law.target(*denoised(x, t_B), t_B), x), x, t_B)

    @jax.jit
    def run(keys):
        noise = cosine.keyed_noise(keys, SHAPE)
        x = law.initial_deviation * noise(0)
        return cosine.sample(predict, law.step, x, cosine.sampling_times(steps), noise)

    samples = np.asarray(run(example_keys(jax.random.key(2), jnp.arange(1000))))
    # Of 24,000 values; first-order steps leave the deviation a little short (3 % with 80 steps).
    assert samples.mean() == pytest.approx(mean, abs=0.02)
    assert samples.std() == pytest.approx(deviation, rel=0.015)


def test_an_untrained_head_is_finite_and_unknown_forms_are_listed():
    x0, eps = draws(2)
    t_B = jnp.linspace(0.001, 1, 5)
    zero = jnp.zeros_like(x0)
    for name, law in FORMS.items():
        output = (zero, zero + 0.5 * (name == "eps_ab_sigmoid"))
        gradient = jax.grad(lambda a, law=law, output=output: law.loss((a, output[1]), x0, eps, t_B).sum())(zero)
        assert np.isfinite(law.loss(output, x0, eps, t_B)).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(FORMS["eps_ab"].predict((zero, zero), x0, t_B), x0, rtol=2e-5)
    with pytest.raises(ValueError, match="found prediction form 'x0', expected one of .*'edm'.*'v'"):
        form("x0")
