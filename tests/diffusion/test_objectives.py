"""The objectives that compare two levels, on nets that record what they are given; nothing is compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion import objectives
from fid_imagegen.diffusion.distances import l2, pseudo_huber
from fid_imagegen.diffusion.noise import NoiseRange, ct_levels, ct_target_decay, ict_levels, karras_sigma
from fid_imagegen.diffusion.preconditioning import c_skip, preconditioning

NOISE = NoiseRange()
STEPS, STEP = 1000, 130
KEY = jax.random.key(7)
PAIRED = ("ct", "ict", "ect")  # two levels of one noisy image are compared
BATCH = 6
X0 = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, 2, 3, 1)), jnp.float32)
KEYS = jax.random.split(jax.random.key(1), BATCH)


def build(name, form="x0_blend", distance=l2, **fields):
    return objectives.build(name, noise=NOISE, form=preconditioning(form), distance=distance, num_steps=STEPS, **fields)


class Recorder:
    """A net whose output is `value`, and which keeps its inputs with sigma and c_in undone."""

    def __init__(self, value=0.0):
        self.value, self.calls = value, []

    def __call__(self, x, levels_BK, cond, *, key):
        sigma = jnp.exp(4 * levels_BK[:, 0])
        noisy = x * jnp.sqrt(sigma**2 + 0.25)[:, None, None, None]
        self.calls.append({"sigma": sigma, "noisy": noisy, "cond": cond, "key": key})
        return jnp.full_like(x, self.value)


def record(name, x0=X0, keys=KEYS, **fields):
    """(student's call, target's call, loss per image)."""
    student, target = Recorder(), Recorder()
    nets = {"student": student, "target": target}
    loss, _ = build(name, **fields)(nets, x0, "labels", keys=keys, key=KEY, step=jnp.asarray(STEP))
    ahead, behind = [*student.calls, *target.calls]
    assert len(target.calls) == (name == "ct")  # ict and ect have no target network
    return ahead, behind, loss


@pytest.mark.parametrize("name", PAIRED)
def test_student_and_target_share_noise_key_and_condition(name):
    ahead, behind, _ = record(name)
    z, other = ((c["noisy"] - X0) / c["sigma"][:, None, None, None] for c in (ahead, behind))
    np.testing.assert_allclose(z, other, atol=2e-3)  # the smallest sigma divides float32 noise
    assert 0.5 < float(jnp.std(z)) < 1.5
    assert ahead["key"] is behind["key"] is KEY and ahead["cond"] == behind["cond"] == "labels"
    assert (behind["sigma"] < ahead["sigma"]).all()


@pytest.mark.parametrize("name", PAIRED)
def test_a_row_does_not_depend_on_the_batch_around_it(name):
    *_, whole = record(name)
    *_, part = record(name, x0=X0[2:5], keys=KEYS[2:5])
    np.testing.assert_allclose(part, whole[2:5], rtol=1e-5)


@pytest.mark.parametrize("name", ["ct", "ict"])
def test_discrete_levels_are_neighbours_on_the_grid(name):
    count = {"ct": ct_levels(STEP, STEPS, 2, 150), "ict": ict_levels(STEP, STEPS, 10, 1280)}[name]
    grid = np.asarray(karras_sigma(jnp.arange(float(count)), count, NOISE))
    many = 2000
    ahead, behind, _ = record(name, x0=jnp.zeros((many, 1, 1, 1)), keys=jax.random.split(KEY, many))
    index = [np.abs(np.log(grid) - np.log(np.asarray(c["sigma"]))[:, None]).argmin(axis=1) for c in (ahead, behind)]
    np.testing.assert_array_equal(index[1], index[0] + 1)
    for call, i in zip((ahead, behind), index, strict=True):
        np.testing.assert_allclose(call["sigma"], grid[i], rtol=1e-4)
    assert index[0].min() >= 0 and index[0].max() <= count - 2
    if name == "ct":  # uniform over all of 0 .. N - 2
        found = np.bincount(index[0], minlength=count - 1)
        assert found.min() > 0 and ((found - many / (count - 1)) ** 2).sum() / (many / (count - 1)) < 2 * count


def test_weights():
    # f differs by (c_skip - c_skip') x0 plus noise for a net that answers 0: recompute it from what the nets saw.
    for name in PAIRED:
        ahead, behind, loss = record(name)
        f, g = (c_skip(c["sigma"], NOISE)[:, None, None, None] * c["noisy"] for c in (ahead, behind))
        weight = 1.0 if name == "ct" else 1 / (ahead["sigma"] - behind["sigma"])
        np.testing.assert_allclose(loss, weight * l2(f, g), rtol=2e-3)
        assert (loss > 0).all()


def test_the_distance_is_the_one_given():
    losses = [record("ect", distance=distance)[2] for distance in (l2, pseudo_huber)]
    assert not np.allclose(*losses)


def linear(weight):
    return lambda x, levels_BK, cond, *, key: weight * x + 0.3 * levels_BK[:, :1, None, None]


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_the_noise_is_the_one_given(name):
    """That of windows is interpolated. Here no answer is a number, for the noise is none."""
    objective = build(
        name,
        form="mean_flow" if name == "meanflow" else "edm",
        draw=lambda keys, shape: jnp.full((len(keys), *shape), jnp.nan),
    )
    nets = dict.fromkeys(("student", "target", "teacher"), linear(0.8))
    loss, _ = objective(nets, X0, None, keys=KEYS, key=KEY, step=jnp.asarray(STEP))
    assert np.isnan(loss).all()


@pytest.mark.parametrize("name", PAIRED)
def test_no_gradient_enters_the_target(name):
    objective = build(name, form="edm")

    def loss(student, target):
        # The frozen copy answers where the target does: the second of the two calls where there is no target network.
        calls = iter((linear(student), linear(target)))
        both = lambda *args, key: next(calls)(*args, key=key)  # noqa: E731
        nets = {"student": linear(student), "target": linear(target)} if name == "ct" else {"student": both}
        return objective(nets, X0, None, keys=KEYS, key=KEY, step=jnp.asarray(STEP))[0].mean()

    student, target = jax.grad(loss, argnums=(0, 1))(0.8, 0.8)
    assert abs(student) > 1e-6 and target == 0
    if name != "ct":  # with one network for both, the gradient is the student's alone
        whole = lambda w: objective({"student": linear(w)}, X0, None, keys=KEYS, key=KEY, step=STEP)[0].mean()  # noqa: E731
        assert jax.grad(whole)(0.8) == pytest.approx(float(student), rel=1e-5)


@pytest.mark.parametrize("form", ["edm", "x0_blend"])
def test_equal_levels_have_no_distance(form):
    """Equal nets at one level differ only if noise, dropout or jitter do."""

    def noisy_net(x, levels_BK, cond, *, key):
        return x + jax.random.normal(key, x.shape)

    sigma = jnp.geomspace(0.002, 80, BATCH)
    objective = build("ict", form=form)
    loss = objective.pair_distance(noisy_net, noisy_net, X0, None, sigma, sigma, keys=KEYS, key=KEY)
    np.testing.assert_array_equal(loss, np.zeros(BATCH))


def test_ct_target_decay_is_the_released_codes():
    assert build("ct").target_decay(0) == pytest.approx(0.81)
    assert build("ct").target_decay(STEPS // 2) == pytest.approx(ct_target_decay(STEPS // 2, STEPS, 2, 150, 0.9))
    assert build("ict").target_decay is None and build("ect").target_decay is None


def test_defaults_are_the_papers():
    assert (build("ct").s0, build("ct").s1, build("ct").mu0) == (2, 150, 0.9)
    assert (build("ict").s0, build("ict").s1) == (10, 1280)
    for name in ("ict", "ect"):
        assert (build(name).log_mean, build(name).log_deviation) == (-1.1, 2.0)


@pytest.mark.parametrize(("name", "least"), [("ct", 2), ("ict", 1)])
def test_a_schedule_that_ends_below_its_start_is_refused(name, least):
    with pytest.raises(ValueError, match=f"found s0=10, s1=5, expected {least} <= s0 <= s1"):
        build(name, s0=10, s1=5)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"s0": 1}, "found s0=1, s1=150, expected 2 <= s0"), ({"mu0": 1.5}, "found mu0=1.5, expected 0 <")],
)
def test_ct_asks_for_a_pair_and_for_a_decay(field, message):
    with pytest.raises(ValueError, match=message):
        build("ct", **field)


T = jnp.asarray([0.01, 0.1, 1.0, 10.0, 80.0])


@pytest.mark.parametrize(
    ("stage", "lower"), [(0, [0.002, 0.002, 0.002, 4.998, 40.0]), (4, [0.0084, 0.085, 0.9015, 9.687, 77.5])]
)
def test_ect_lower_levels(stage, lower):
    """The paper's r(t) for q = 2, but for the clamp: at sigma_min, not at 0."""
    np.testing.assert_allclose(build("ect").lower_level(T, jnp.float32(stage)), lower, rtol=2e-3, atol=5e-5)


def test_ect_lower_levels_of_the_one_hour_recipe():
    ratios = build("ect", q=256.0).lower_level(T, jnp.float32(0)) / T
    np.testing.assert_allclose(ratios, [0.98055, 0.98125, 0.98769, 0.99609, 0.99609], atol=1e-5)


def test_ect_stages_have_equal_length():
    stages = [float(build("ect").stage(jnp.asarray(step))) for step in (0, 124, 125, 500, 999, 5000)]
    assert stages == [0, 0, 1, 4, 7, 7]


def test_ect_stays_finite_where_there_is_no_level_below():
    """At sigma_min itself the pair has no gap to divide by."""
    narrow = NoiseRange(sigma_min=0.002, sigma_max=0.002001)
    objective = objectives.build(
        "ect", noise=narrow, form=preconditioning("x0_blend"), distance=pseudo_huber, num_steps=STEPS
    )
    loss, _ = objective({"student": Recorder(1.0)}, X0, None, keys=KEYS, key=KEY, step=jnp.asarray(999))
    assert np.isfinite(loss).all()


def test_unknown_objectives_list_the_known():
    with pytest.raises(ValueError, match="found objective 'imm', expected one of .'cd', 'ct', 'ect', 'edm', .*'sct'."):
        objectives.build("imm")


def test_fields_of_another_objective_are_named():
    """What `--config.objective.name` alone leaves behind."""
    with pytest.raises(
        ValueError, match="found b, k, q, stages for objective 'ict', which has none: .*config.objective"
    ):
        build("ict", q=2.0, stages=8, k=8.0, b=1.0, log_mean=-1.1)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("cd", {"levels": 1}, "found levels=1, mu=0.0, expected levels >= 2"),
        ("cd", {"mu": 1.0}, "mu=1.0, expected levels >= 2 and 0 <= mu < 1"),
        ("ect", {"stages": 0}, "found stages=0, q=2.0, expected stages >= 1 and q > 1"),
        ("ect", {"q": 1.0}, "q=1.0, expected stages >= 1 and q > 1"),
        ("sct", {"weight_cosines": -1}, "found weight_cosines=-1, expected 0 or more terms"),
        ("meanflow", {"instant": 1.5}, "found instant=1.5, expected a share from 0 to 1"),
    ],
)
def test_objectives_that_cannot_be(name, fields, message):
    with pytest.raises(ValueError, match=message):
        build(name, form="mean_flow" if name == "meanflow" else "edm", **fields)
