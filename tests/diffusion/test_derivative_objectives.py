"""edm, cd, sct and meanflow against closed forms: data of one image, Gaussian data, finite differences. In float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fid_imagegen.diffusion import objectives
from fid_imagegen.diffusion.distances import l2
from fid_imagegen.diffusion.noise import NoiseRange, example_normal, karras_sigma, lognormal_sigmas
from fid_imagegen.diffusion.preconditioning import angle, consistency_function, per_image, preconditioning
from fid_imagegen.diffusion.samplers import heun_step

NOISE = NoiseRange()
KEYS = jax.random.split(jax.random.key(1), 64)
KEY = jax.random.key(2)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 2, 3, 2))
FORMS = {"edm": ("edm", "log"), "cd": ("edm", "log"), "sct": ("edm", "angle"), "meanflow": ("mean_flow", "log")}
LEVEL = {"log": lambda c: jnp.exp(4 * c), "angle": lambda t: NOISE.sigma_data * jnp.tan(t)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def build(name, form=None, **fields):
    form = preconditioning(*(form or FORMS[name]))
    return objectives.build(name, noise=NOISE, form=form, distance=l2, num_steps=1000, **fields)


def answering(clean, form, time):
    """The net whose consistency function is `clean(x, sigma)`."""
    made = preconditioning(form, time)

    def net(scaled, levels_BK, cond, *, key=None):
        if form == "mean_flow":
            sigma = levels_BK[:, 0] / (1 - levels_BK[:, 0])
            return clean(scaled * per_image(1 + sigma), sigma)
        sigma = LEVEL[time](levels_BK[:, 0])
        x = scaled / per_image(made.c_in(sigma, NOISE))
        skipped = per_image(made.c_skip(sigma, NOISE)) * x
        out = per_image(made.c_out(sigma, NOISE))  # at sigma_min nothing: the answer is the input
        return jnp.where(out > 1e-6, (clean(x, sigma) - skipped) / jnp.maximum(out, 1e-6), 0)

    return net


def run(objective, student, x0, step=10**6, teacher=None):
    loss, metrics = objective({"student": student, "teacher": teacher}, x0, None, keys=KEYS, key=KEY, step=step)
    return np.asarray(loss), metrics


@pytest.mark.parametrize("name", FORMS)
def test_a_set_of_one_image_has_no_loss_where_every_jump_ends_at_it(name):
    """And a net that answers with another image has some, at every row."""
    x0 = jnp.asarray(np.repeat(IMAGE, 64, axis=0))
    right, wrong = (answering(lambda x, sigma, c=c: c + 0 * x, *FORMS[name]) for c in (x0, x0 + 0.1))
    # Below t = 0.05 MeanFlow's net of clean images is not told how fast to go: images are, all but the nearest.
    fields = (
        {"logit_mean": 1.5, "logit_deviation": 0.5} if name == "meanflow" else {"log_mean": 0.5, "log_deviation": 0.5}
    )
    objective = build(name, **({} if name == "cd" else fields))
    loss, _ = run(objective, right, x0, teacher=right)
    # Of cd the last answer is the input, sigma_min from clean.
    assert np.abs(loss).max() < (NOISE.sigma_min**2 if name == "cd" else 1e-9)
    if name in ("edm", "meanflow"):  # the others ask that answers agree, as these do: the boundary says which
        assert run(objective, wrong, x0)[0].min() > 1e-6


@pytest.mark.parametrize("name", FORMS)
def test_nets_are_given_the_condition_and_the_student_its_dropout(name):
    seen = []

    def recorder(who):
        return lambda scaled, levels_BK, cond, *, key=None: seen.append((who, cond, key)) or 0.1 * scaled

    nets = {who: recorder(who) for who in ("student", "teacher")}
    build(name)(nets, jnp.zeros((64, 1, 1, 1)), "labels", keys=KEYS, key=KEY, step=7)
    assert {who for who, *_ in seen} == ({"student", "teacher"} if name == "cd" else {"student"})
    assert all(cond == "labels" and key is (KEY if who == "student" else None) for who, cond, key in seen)


def test_edm_weighs_the_square_by_level():
    x0, seen = jnp.zeros((64, 2, 3, 2)), {}

    def net(scaled, levels_BK, cond, *, key=None):
        seen["sigma"] = jnp.exp(4 * levels_BK[:, 0])
        return 0 * scaled

    objective = build("edm")
    loss, _ = run(objective, net, x0)
    sigma, keys = seen["sigma"], jax.vmap(lambda k: jax.random.split(k, 2))(KEYS)
    denoised = per_image(objective.form.c_skip(sigma, NOISE) * sigma) * example_normal(keys[:, 1], x0.shape[1:])
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    np.testing.assert_allclose(loss, weight * jnp.mean(denoised**2, axis=(1, 2, 3)), rtol=1e-5)
    assert float(jnp.log(sigma).mean()) == pytest.approx(-1.2, abs=0.5)


def test_heun_goes_down_the_path_of_gaussian_data():
    """Of N(0, s^2) the denoiser is x s^2 / (s^2 + sigma^2) and paths are x(sigma) ~ sqrt(s^2 + sigma^2): second order."""
    s, x = 0.5, jnp.asarray(np.random.default_rng(1).standard_normal((4, 2, 3, 2)))
    denoise = lambda x, sigma: x * per_image(s**2 / (s**2 + sigma**2))  # noqa: E731
    errors = []
    for h in (0.2, 0.1):
        high, low = jnp.asarray([0.5, 1.0, 4.0, 20.0]), jnp.asarray([0.5, 1.0, 4.0, 20.0]) * (1 - h)
        exact = x * per_image(jnp.sqrt((s**2 + low**2) / (s**2 + high**2)))
        errors.append(np.abs(heun_step(denoise, x, high, low, smallest=0.002) - exact).max(axis=(1, 2, 3)))
    assert (errors[0] / errors[1] > 6).all()  # a third-order error a step; Euler's ratio is 4


def test_cd_asks_two_points_of_the_teachers_path_for_one_answer():
    s = 0.5
    x0 = s * example_normal(KEYS, (2, 3, 2))
    teacher = answering(lambda x, sigma: x * per_image(s**2 / (s**2 + sigma**2)), "edm", "log")
    ends = lambda x, sigma: x * per_image(jnp.sqrt((s**2 + NOISE.sigma_min**2) / (s**2 + sigma**2)))  # noqa: E731
    objective = build("cd", levels=200)
    agreed, _ = run(objective, answering(ends, "edm", "log"), x0, teacher=teacher)
    denoiser, _ = run(objective, teacher, x0, teacher=teacher)
    assert agreed.max() < 1e-6 < 1e-5 < denoiser.mean()
    # Levels are neighbours on the grid, every one of them.
    seen = []
    record = lambda *args, key=None: seen.append(jnp.exp(4 * args[1][:, 0])) or teacher(*args)  # noqa: E731
    run(build("cd"), record, x0, teacher=teacher)
    grid = np.asarray(karras_sigma(jnp.arange(18.0), jnp.int32(18), NOISE))
    index = [np.abs(np.log(grid) - np.log(np.asarray(sigma))[:, None]).argmin(axis=1) for sigma in seen]
    np.testing.assert_array_equal(index[1], index[0] + 1)
    assert set(index[0]) == set(range(17))


def test_cd_has_a_target_where_it_is_given_a_decay():
    assert build("cd").target_decay is None and float(build("cd", mu=0.95).target_decay(3)) == pytest.approx(0.95)
    x0, zero = jnp.zeros((64, 1, 1, 1)), lambda scaled, levels_BK, cond, *, key=None: 0 * scaled
    called = []
    target = lambda *args, key=None: called.append(1) or zero(*args)  # noqa: E731
    build("cd", mu=0.95)({"student": zero, "teacher": zero, "target": target}, x0, None, keys=KEYS, key=KEY, step=0)
    assert called == [1]


def some_net(scaled, levels_BK, cond, *, key=None):
    return jnp.sin(scaled + 0.7 * per_image(levels_BK[:, 0])) * 0.3


def path(x0):
    """(t, x_t(t), dx/dt) of the noise that sct draws."""
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(KEYS)
    t, z = angle(lognormal_sigmas(keys[:, 0], -1.0, 1.4, NOISE), NOISE), 0.5 * example_normal(keys[:, 1], x0.shape[1:])
    x_t = lambda t: per_image(jnp.cos(t)) * x0 + per_image(jnp.sin(t)) * z  # noqa: E731
    return t, x_t, per_image(jnp.cos(t)) * z - per_image(jnp.sin(t)) * x0


def consistent(form, x_t, t):
    common = {"key": None, "noise": NOISE, "form": preconditioning(*form)}
    return consistency_function(some_net, x_t / per_image(jnp.cos(t)), 0.5 * jnp.tan(t), None, **common)


def norms(loss, dimensions):
    """Of the tangents g, from losses (n / (n + c))^2 / dimensions at c = 1."""
    ratio = np.sqrt(loss * dimensions)
    return ratio / (1 - ratio)


@pytest.mark.parametrize("form", [("edm", "angle"), ("edm", "log"), ("x0_blend", "angle")])
def test_sct_moves_along_the_derivative_of_f(form):
    """g is cos t df/dt along the path: found here by finite differences of f."""
    x0, h = example_normal(KEYS, (2, 3, 2)) / 2, 1e-6
    loss, metrics = run(build("sct", form, normaliser=1.0), some_net, x0)
    t, x_t, _ = path(x0)
    g = per_image(jnp.cos(t)) * (consistent(form, x_t(t + h), t + h) - consistent(form, x_t(t - h), t - h)) / (2 * h)
    norm = np.sqrt(np.sum(np.asarray(g) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(norms(loss, 12), norm, rtol=1e-4)
    assert float(metrics["tangent"]) == pytest.approx(norm.mean(), rel=1e-4) and float(metrics["ramp"]) == 1


def test_scts_warmup_begins_with_the_stable_half():
    """Without the derivative g is -cos^2 t (sigma_data F - dx/dt), which is diffusion's."""
    objective, x0 = build("sct", warmup=100, normaliser=1.0), example_normal(KEYS, (2, 3, 2)) / 2
    ramps = [float(run(objective, some_net, x0, step=step)[1]["ramp"]) for step in (0, 50, 100, 500)]
    assert ramps == [0, 0.5, 1, 1]
    t, x_t, dx_dt = path(x0)
    velocity = (per_image(jnp.cos(t)) * x_t(t) - consistent(FORMS["sct"], x_t(t), t)) / per_image(jnp.sin(t))
    g = per_image(jnp.cos(t) ** 2) * (velocity - dx_dt)
    norm = np.sqrt(np.sum(np.asarray(g) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(norms(run(objective, some_net, x0, step=0)[0], 12), norm, rtol=1e-5)


def test_scts_gradient_is_the_plain_evaluations():
    """Of mean |F - stop_gradient(F + g)|^2 it is -2 g dF: for a net that is linear in its one weight."""
    objective, x0, form, h = build("sct"), example_normal(KEYS, (2, 3, 2)) / 2, FORMS["sct"], 1e-6

    def loss(w):
        net = lambda *args, key=None: w * some_net(*args)  # noqa: E731
        return objective({"student": net}, x0, None, keys=KEYS, key=KEY, step=10**6)[0].mean()

    t, x_t, _ = path(x0)
    made, sigma = preconditioning(*form), 0.5 * jnp.tan(t)
    x = x_t(t) / per_image(jnp.cos(t))
    raw = some_net(per_image(made.c_in(sigma, NOISE)) * x, made.levels(sigma, NOISE), None)
    slope = -per_image(made.c_out(sigma, NOISE)) * raw / (0.5 * per_image(jnp.sin(t)))
    g = per_image(jnp.cos(t)) * (consistent(form, x_t(t + h), t + h) - consistent(form, x_t(t - h), t - h)) / (2 * h)
    g /= jnp.sqrt(jnp.sum(g**2, axis=(1, 2, 3), keepdims=True)) + 0.1
    assert float(jax.grad(loss)(1.0)) == pytest.approx(float(jnp.mean(-2 * g * slope)), rel=1e-4)


def test_scts_teacher_says_which_way_the_path_goes():
    """One that knows the image says what the noise says; another does not."""
    x0 = jnp.asarray(np.repeat(IMAGE, 64, axis=0))
    knows, errs = (answering(lambda x, sigma, c=c: c + 0 * x, *FORMS["sct"]) for c in (x0, x0 + 0.1))
    trained, objective = run(build("sct"), some_net, x0)[0], build("sct", distilled=True)
    assert objective.needs_teacher and not build("sct").needs_teacher
    np.testing.assert_allclose(run(objective, some_net, x0, teacher=knows)[0], trained, rtol=1e-6)
    assert np.abs(run(objective, some_net, x0, teacher=errs)[0] / trained - 1).max() > 1e-3


def weighed(cosines, x0, w=1.0):
    """(loss [64], metrics) of a net of one weight, the weight of levels a cosine series; None: none is learned."""
    objective = build("sct", weight_cosines=0 if cosines is None else len(cosines))
    nets = {"student": lambda *args, key=None: w * some_net(*args)}
    nets |= objective.nets({"level_weight": {"cosines": cosines}})
    return objective(nets, x0, None, keys=KEYS, key=KEY, step=10**6)


def test_scts_weight_of_levels_is_none_at_first():
    objective, x0 = build("sct", weight_cosines=6), example_normal(KEYS, (2, 3, 2)) / 2
    assert set(objective.own) == {"level_weight"} and build("sct").own == build("edm").own == {}
    fresh = objective.init(KEY)["level_weight"]["cosines"]
    assert fresh.shape == (6,)
    np.testing.assert_array_equal(weighed(fresh, x0)[0], weighed(None, x0)[0])
    assert set(weighed(fresh, x0)[1]) - set(weighed(None, x0)[1]) == {"level_weight", "unweighted"}


def test_scts_weight_scales_the_students_gradient():
    """By e^w of the image's level; what is taken from the loss is no business of the student."""
    x0, cosines = example_normal(KEYS, (2, 3, 2)) / 2, jnp.asarray([0.7, -0.4, 0.2, 0.9, 0.0, -0.3])
    w = sum(each * np.cos(2 * k * path(x0)[0]) for k, each in enumerate(np.asarray(cosines)))
    (plain, _), (loss, metrics) = weighed(None, x0), weighed(cosines, x0)
    np.testing.assert_allclose(loss, np.exp(w) * plain - w, rtol=1e-9)
    slopes = [jax.jacrev(lambda v, c=c: weighed(c, x0, v)[0])(1.0) for c in (None, cosines)]
    np.testing.assert_allclose(slopes[1], np.exp(w) * slopes[0], rtol=1e-9)
    assert float(metrics["unweighted"]) == pytest.approx(plain.mean())
    assert float(metrics["level_weight"]) == pytest.approx(w.mean())


def test_scts_weight_learns_one_over_the_mean_loss_of_a_level():
    """Where F is 0 and data are N(0, s^2), s = sigma_data, g is cos t times noise of deviation s: of D values its norm is s cos t
    times a chi of D, and the mean loss of a level a mean over chi."""
    levels, (chi, images) = (
        {"log_mean": -0.7, "log_deviation": 0.7},
        (np.random.default_rng(0).chisquare(12, 4000) ** 0.5, 2048),
    )
    keys, x0 = (jax.random.split(jax.random.key(seed), images) for seed in (3, 4))
    x0, objective = 0.5 * example_normal(x0, (2, 3, 2)), build("sct", normaliser=1.0, weight_cosines=6, **levels)
    still = answering(lambda x, sigma: x * per_image(jnp.cos(angle(sigma, NOISE)) ** 2), *FORMS["sct"])

    def losses(own):
        nets = {"student": still} | objective.nets(own)
        return objective(nets, x0, None, keys=keys, key=KEY, step=10**6)[0]

    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, 150))

    def step(carry, _):
        own, state = carry
        updates, state = optimizer.update(jax.grad(lambda own: losses(own).mean())(own), state)
        return (optax.apply_updates(own, updates), state), None

    fresh = objective.init(KEY)
    (learned, _), _ = jax.jit(lambda own: jax.lax.scan(step, (own, optimizer.init(own)), length=150))(fresh)
    t = angle(lognormal_sigmas(jax.vmap(lambda k: jax.random.split(k, 2))(keys)[:, 0], -0.7, 0.7, NOISE), NOISE)
    w, norm = np.asarray(objective.nets(learned)["level_weight"](t)), 0.5 * np.cos(t)[:, None] * chi
    inside = (np.quantile(t, 0.02) < t) & (t < np.quantile(t, 0.98))
    mean_loss = np.mean((norm / (norm + 1)) ** 2 / 12, axis=1)
    np.testing.assert_allclose((np.exp(w) * mean_loss)[inside], 1, atol=0.1)
    # So it is for the losses that were seen, at every level.
    seen = np.exp(w) * np.asarray(jax.jit(losses)(fresh))
    np.testing.assert_allclose([seen[i].mean() for i in np.array_split(np.argsort(t), 8)], 1, atol=0.05)


def test_meanflow_draws_the_ends_of_jumps():
    objective = build("meanflow")
    t, r = (np.asarray(v) for v in objective.times(jax.random.split(jax.random.key(5), 4000)))
    assert (r <= t).all() and np.mean(r == t) == pytest.approx(0.75, abs=0.03)
    assert np.log(t / (1 - t))[r == t].mean() == pytest.approx(-0.4, abs=0.06)
    # The larger and smaller of two standard normals lie 1/sqrt(pi) from their mean.
    assert np.log(t / (1 - t))[r < t].mean() == pytest.approx(-0.4 + np.pi**-0.5, abs=0.08)
    assert np.log(r / (1 - r))[r < t].mean() == pytest.approx(-0.4 - np.pi**-0.5, abs=0.08)


def test_meanflow_stays_on_the_path_that_is_sampled():
    t, r = build("meanflow", logit_deviation=10.0).times(jax.random.split(jax.random.key(5), 400))
    assert float(r.min()) == pytest.approx(0.002 / 1.002) and float(t.max()) == pytest.approx(80 / 81)


def test_meanflow_weighs_by_the_error():
    """As a constant: gradients are weighed as values are."""
    x0 = example_normal(KEYS, (2, 3, 2)) / 2

    def losses(w, power):
        net = lambda *args, key=None: w * some_net_flow(*args)  # noqa: E731
        objective = build("meanflow", power=power)
        return objective({"student": net}, x0, None, keys=KEYS, key=KEY, step=0)[0]

    plain, weight = losses(1.0, 0.0), (losses(1.0, 0.0) + 0.01) ** -0.75
    np.testing.assert_allclose(losses(1.0, 0.75), weight * plain, rtol=1e-6)
    slopes = [jax.jacrev(losses)(1.0, power) for power in (0.0, 0.75)]
    np.testing.assert_allclose(slopes[1], weight * slopes[0], rtol=1e-6)


@pytest.mark.parametrize("logit_mean", [-0.4, -3.5])  # below t = 0.05 too
def test_meanflow_holds_the_velocity_to_the_data(logit_mean):
    """v = u + (t - r) du/dt, du/dt = du/dz v(z, t) + du/dt by finite differences, against e - x0."""
    objective = build("meanflow", power=0.0, instant=0.0, logit_mean=logit_mean)
    x0 = example_normal(KEYS, (2, 3, 2)) / 2
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(KEYS)
    t, r = objective.times(keys[:, 0])
    e = example_normal(keys[:, 1], x0.shape[1:])
    z = per_image(1 - t) * x0 + per_image(t) * e

    def u(z, t, r):
        return (z - some_net_flow(z, jnp.stack([t, t - r], -1), None)) / per_image(jnp.maximum(t, 0.05))

    v, h = u(z, t, t), 1e-6
    du = (u(z + h * v, t + h, r) - u(z - h * v, t - h, r)) / (2 * h)
    error = u(z, t, r) + per_image(t - r) * du - (e - x0)
    found, metrics = run(objective, some_net_flow, x0)
    np.testing.assert_allclose(found, jnp.sum(error**2, axis=(1, 2, 3)), rtol=1e-5)
    assert float(metrics["velocity_error"]) == pytest.approx(float(jnp.mean(error**2)), rel=1e-5)

    def loss(w):
        net = lambda *args, key=None: w * some_net_flow(*args)  # noqa: E731
        return objective({"student": net}, x0, None, keys=KEYS, key=KEY, step=0)[0].mean()

    # The gradient is that of u alone, linear in the one weight.
    slope = -some_net_flow(z, jnp.stack([t, t - r], -1), None) / per_image(jnp.maximum(t, 0.05))
    expected = jnp.mean(jnp.sum(2 * error * slope, axis=(1, 2, 3)))
    assert float(jax.grad(loss)(1.0)) == pytest.approx(float(expected), rel=1e-5)


def some_net_flow(z, levels_BK, cond, *, key=None):
    return 0.3 * jnp.sin(z + 0.7 * per_image(levels_BK[:, 0]) - 1.3 * per_image(levels_BK[:, 1]))


def test_meanflow_needs_a_network_that_is_told_both_ends():
    with pytest.raises(ValueError, match="expected 'mean_flow', .*set config.preconditioning='mean_flow'"):
        build("meanflow", ("edm", "log"))
