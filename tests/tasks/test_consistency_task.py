import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen.diffusion import editing
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.diffusion.preconditioning import consistency_function, preconditioning
from fid_imagegen.models.rendering import render
from fid_imagegen.tasks.generator import render_native, to_float

DERIVATIVES = {
    "sct": {"objective": common.objective("sct"), "time": "angle", "model.level_scale": 1.0, "distance": "l2"},
    "meanflow": {
        "objective": common.objective("meanflow"),
        "preconditioning": "mean_flow",
        "model.level_scale": 1.0,
        "distance": "l2",
    },
}
CT = {"objective": common.objective("ct"), "preconditioning": "edm", "distance": "l2"}


@pytest.fixture(scope="module")
def task(tiny_task):
    """Three classes, jitter, no dropout (its masks follow the batch's shape)."""
    return tiny_task({"model.num_classes": 3})


@pytest.fixture(scope="module")
def params(task, random_params):
    return random_params(task)


@pytest.fixture(scope="module")
def net(task, params):
    """The network as samplers see it."""
    return jax.jit(task._net(params["generator"], training=False))


@pytest.fixture(scope="module")
def loss(task):
    return jax.jit(lambda *args: task.loss(*args)[0])


@pytest.fixture(scope="module")
def sample(task):
    """The two-step samples of (params, key, three indices)."""
    return jax.jit(functools.partial(task.sample, steps=2))


@pytest.mark.parametrize("form", ["edm", "x0_blend"])
def test_the_boundary_condition_is_exact_for_any_weights(net, task, batch, form):
    x = 3 * to_float(batch["image"])
    f = functools.partial(
        consistency_function, net, x, cond=batch["label"], key=None, noise=task.noise, form=preconditioning(form)
    )
    np.testing.assert_array_equal(f(sigma_B=jnp.full(4, task.noise.sigma_min)), x)
    assert np.abs(f(sigma_B=jnp.full(4, 1.0)) - x).max() > 0.1


@pytest.mark.parametrize("changes", [{"model.dropout": 0.5, "variational": False}, {"variational": True}])
def test_one_key_is_one_dropout_and_one_jitter(tiny_task, params, batch, net, changes):
    task = tiny_task({"model.num_classes": 3} | changes)
    train = jax.jit(task._net(params["generator"], training=True))
    inputs = to_float(batch["image"]), jnp.zeros((4, 1)), batch["label"]
    first = train(*inputs, key=jax.random.key(0))
    np.testing.assert_array_equal(first, train(*inputs, key=jax.random.key(0)))
    assert np.abs(first - train(*inputs, key=jax.random.key(1))).max() > 1e-3
    # Neither is left in what samples.
    still = net(*inputs, key=jax.random.key(0))
    np.testing.assert_array_equal(still, net(*inputs, key=jax.random.key(1)))
    assert np.abs(first - still).max() > 1e-3


def test_noise_follows_the_row_and_not_the_place(task, params, loss, batch):
    """What gradient accumulation and any number of devices rely on."""
    dealt = jax.tree.map(lambda x: x[jnp.asarray([2, 0, 3, 1])], batch)
    whole, again = (loss(params, {}, rows, jax.random.key(3), jnp.asarray(2)) for rows in (batch, dealt))
    assert float(again) == pytest.approx(float(whole), rel=1e-5)
    moved = loss(params, {}, batch | {"row": batch["row"] + 4}, jax.random.key(3), jnp.asarray(2))
    assert float(moved) != pytest.approx(float(whole), rel=1e-3)


def test_loss_depends_on_key_and_step(loss, params, batch):
    values = {float(loss(params, {}, batch, jax.random.key(k), jnp.asarray(s))) for k, s in ((0, 0), (1, 0), (0, 7))}
    assert len(values) == 3 and np.isfinite(list(values)).all()


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_go_through_the_generator(tiny_task, random_params, batch, name):
    """Through trunk, predictor and rendering, recomputed or not; every parameter learns."""
    task = tiny_task(DERIVATIVES[name] | {"model.remat": True, "render_chunk": 48})
    params = random_params(task)
    loss = lambda params: task.loss(params, {}, batch, jax.random.key(3), jnp.asarray(20_000))[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    functions = jax.jit(functools.partial(task.sample, steps=2))(params, jax.random.key(0), jnp.arange(2))
    assert render(functions, 12, 9).shape == (2, 12, 9, 1)


def test_a_group_of_the_objectives_own_learns_and_is_not_sampled(tiny_task, random_params, batch):
    changes, own = DERIVATIVES["sct"], common.objective("sct", weight_cosines=3)
    plain, task = tiny_task(changes), tiny_task(changes | {"objective": own})
    assert (plain.trained, task.trained) == (("generator",), ("generator", "level_weight"))
    key, params = jax.random.key(0), random_params(task)
    fresh, with_own = (jax.jit(each.init)(key)[0] for each in (plain, task))
    jax.tree.map(np.testing.assert_array_equal, fresh, {"generator": with_own["generator"]})
    run = lambda task: jax.jit(jax.grad(lambda p: task.loss(p, {}, batch, key, jnp.asarray(20_000))[0]))  # noqa: E731
    descend, zero = run(task), {"cosines": jnp.zeros(3)}
    gradient = descend(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    same, before = descend(params | {"level_weight": zero}), run(plain)({"generator": params["generator"]})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), same["generator"], before["generator"])
    jax.eval_shape(lambda p: task.sample(p, key, jnp.arange(2)), {"generator": params["generator"]})


def test_diffusion_samples_go_down_eighteen_levels(tiny_task, random_params):
    task = tiny_task({"objective": common.objective("edm"), "distance": "l2"})
    params, key = random_params(task), jax.random.key(0)
    draw = lambda steps: jax.jit(functools.partial(task.sample, steps=steps))(params, key, jnp.arange(2))  # noqa: E731
    first, again, fewer = draw(None), draw(18), draw(3)
    np.testing.assert_array_equal(first.native.noisy, again.native.noisy)
    assert np.abs(first.native.noisy - fewer.native.noisy).max() > 1e-3
    np.testing.assert_allclose(first.native.skip, 1, rtol=1e-5)  # of the last evaluation, at sigma_min


def test_mean_flow_samples_go_down_its_own_path(tiny_task, random_params):
    """Two steps: to the middle of the path by what the network says of that jump, guided as f is; the last is a function."""
    task = tiny_task(DERIVATIVES["meanflow"] | {"model.num_classes": 3, "label_dropped": 0.1})
    params, key, index = random_params(task), jax.random.key(0), jnp.arange(3)
    draw = jax.jit(task.sample, static_argnames=("steps", "guidance"))
    start, two, guided = (
        draw(params, key, index, **asked) for asked in ({}, {"steps": 2}, {"steps": 2, "guidance": 2.0})
    )
    net, t, r = jax.jit(task._net(params["generator"], training=False)), 80 / 81, 40 / 81
    z = start.native.noisy / 81
    answers = [net(z, jnp.full((3, 2), jnp.asarray([t, t - r])), labels) for labels in (index, jnp.full(3, 3))]
    there = [(z - (t - r) / t * (z - clean)) / (1 - r) for clean in answers]
    np.testing.assert_allclose(two.native.noisy, there[0], atol=2e-5)
    np.testing.assert_allclose(guided.native.noisy, there[1] + 2 * (there[0] - there[1]), atol=1e-4)
    np.testing.assert_allclose(two.native.skip, 0, atol=1e-6)
    last = net(two.native.noisy * (1 - r), jnp.full((3, 2), r), index)
    np.testing.assert_allclose(render(two, 8, 8), last, atol=2e-5)


def test_the_tracked_target_is_the_objectives(tiny_task, random_params, batch):
    assert tiny_task().tracked == {}
    task = tiny_task(CT)
    (group, decay) = task.tracked["target"]
    assert group == "generator" and float(decay(0)) == pytest.approx(0.81)
    # At step 0 the target is at sigma_min, where any network answers its input. Its gradient is the objective's test.
    groups = random_params(task)
    run = jax.jit(
        lambda target: task.loss(groups | {"target": target}, {}, batch, jax.random.key(0), jnp.asarray(7))[0]
    )
    assert run(groups["generator"]) != run(random_params(task, seed=1)["generator"])


def test_the_objective_is_given_every_group_in_its_role(tiny_task, batch, monkeypatch):
    """The teacher without dropout; its weights, and a target's, are their own."""
    task, seen = tiny_task({"model.num_classes": 3}), {}
    monkeypatch.setattr(task, "_net", lambda params, *, training: (params, training))

    def objective(distance, **more):
        return lambda nets, x0, labels, **keys: seen.update(nets=nets, x0=x0, labels=labels) or (jnp.zeros(4), {})

    monkeypatch.setattr(task, "_objective", objective)
    groups = {name: f"weights of the {name}" for name in ("generator", "target", "teacher")}
    task.loss(groups, {}, batch, jax.random.key(0), 0)
    roles = {"student": ("generator", True), "target": ("target", True), "teacher": ("teacher", False)}
    assert seen["nets"] == {role: (groups[group], training) for role, (group, training) in roles.items()}
    np.testing.assert_array_equal(seen["x0"], to_float(batch["image"]))
    np.testing.assert_array_equal(seen["labels"], batch["label"])
    task.loss({"generator": "alone"}, {}, batch, jax.random.key(0), 0)
    assert set(seen["nets"]) == {"student"}


def test_a_sample_depends_on_the_seed_and_its_number(sample, params):
    key = jax.random.key(5)
    here, there = sample(params, key, jnp.arange(3)), sample(params, key, jnp.arange(2, 5))
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)  # noqa: E731
    jax.tree.map(same, (here[2:].per_image, here[2:].native), (there[:1].per_image, there[:1].native))
    other = sample(params, jax.random.key(6), jnp.arange(3))
    assert np.abs(other.native.noisy - here.native.noisy).max() > 0.1


def test_a_sample_on_its_own_grid_is_the_consistency_function(task, net, sample, params):
    labels = jnp.asarray([2, 0, 1])
    functions = sample(params, jax.random.key(5), jnp.arange(3), label_B=labels)
    x, sigma = functions.native.noisy, jnp.full(3, 0.821)
    f = consistency_function(net, x, sigma, labels, key=None, noise=task.noise, form=task.form)
    np.testing.assert_allclose(render(functions, 8, 8), f, atol=1e-5)
    native = jax.jit(functools.partial(render_native, key=None, chunk=48))(functions)  # 64 pixels in two chunks
    np.testing.assert_allclose(native, f, atol=1e-5)
    np.testing.assert_allclose(functions.native.skip, 0.271515, rtol=1e-4)


def test_an_edit_is_the_last_answer_to_the_noisy_known(task, net, params):
    """By the label it is given, at every step; image i by (key, i)."""
    labels, index, known = jnp.asarray([2, 0]), jnp.asarray([4, 1]), jnp.zeros((2, 8, 8, 1)).at[0, :4].set(0.5)
    project, common = editing.super_resolution(4), {"key": None, "noise": task.noise, "form": task.form}
    denoise = lambda x, sigma_B: consistency_function(net, x, sigma_B, labels, **common)  # noqa: E731
    keys = example_keys(jax.random.key(5), index)
    x, sigma = editing.edit_input(denoise, known, project, keys, steps=3, noise=task.noise)
    expected = editing.replaced(denoise(x, sigma), known, project)
    edit = jax.jit(functools.partial(task.edit, project=project, steps=3))
    edited = edit(params, jax.random.key(5), index, known, label_B=labels)
    np.testing.assert_allclose(render(edited, 8, 8), expected, atol=2e-5)


def test_labels_are_all_classes_in_turn_unless_given(sample, params):
    key, index = jax.random.key(5), jnp.asarray([3, 4, 8])
    turn, given = sample(params, key, index), sample(params, key, index, label_B=jnp.arange(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), turn.per_image, given.per_image)
    other = sample(params, key, index, label_B=jnp.full(3, 2))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(axis=(1, 2)), turn.per_image, other.per_image)
    moved = np.max(jax.tree.leaves(moved), axis=0)
    assert (moved[:2] > 1e-3).all() and moved[2] < 1e-4


def test_labels_for_a_generator_without_classes(tiny_task, random_params):
    task = tiny_task()
    with pytest.raises(ValueError, match="found labels for a model without classes; leave labels out"):
        task.sample(random_params(task), jax.random.key(0), jnp.arange(2), label_B=jnp.zeros(2))


def test_previews_are_samples_on_the_native_grid(task, params, monkeypatch):
    shape = jax.eval_shape(task.preview, params, {"image": jnp.zeros((5, 8, 8, 1), jnp.uint8)})["samples"].shape
    assert shape == (5, 8, 8, 1)
    asked = []
    monkeypatch.setattr(task, "sample", lambda groups, key, index_B: asked.append(index_B) or FAIL)
    with pytest.raises(AttributeError):  # the stand-in is no function
        task.preview(params, {"image": jnp.zeros((5, 8, 8, 1), jnp.uint8)})
    np.testing.assert_array_equal(asked[0], np.arange(5))


def test_the_input_is_scaled_before_the_network(task, params, monkeypatch):
    """Trap 3: ports that feed raw x_t. The sample's own call of the network is looked at, not the objective's."""
    seen = []
    monkeypatch.setattr(
        type(task.model), "apply", lambda self, params, x, level, *a, **k: seen.append((x, level)) or FAIL
    )
    with pytest.raises(AttributeError):  # the stand-in is no function
        task.sample(params, jax.random.key(0), jnp.arange(50))
    (x, level) = seen[0]
    assert float(jnp.std(x)) == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(level, np.full((50, 1), np.log(80) / 4), rtol=1e-6)


FAIL = object()


def test_lpips_without_its_weights_names_the_file(tiny_task, tmp_path):
    task = tiny_task({"distance": "lpips", "lpips.vgg16": str(tmp_path / "vgg16-397923af.pth")})
    with pytest.raises((FileNotFoundError, ValueError), match="vgg16-397923af.pth"):
        task.frozen()
    assert tiny_task().frozen() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance": "l3"}, "found distance 'l3' for objective 'ect', expected one of .*'lpips'.*'pseudo_huber'"),
        (
            DERIVATIVES["sct"] | {"distance": "lpips"},
            "found distance 'lpips' for objective 'sct', expected one of .'l2'.",
        ),
        (
            DERIVATIVES["sct"] | {"model.level_scale": 1e3},
            "found a level embedding of 1000 radians .*model.level_scale=1",
        ),
        (DERIVATIVES["meanflow"] | {"preconditioning": "edm"}, "set config.preconditioning='mean_flow'"),
        (
            {"preconditioning": "mean_flow"},
            r"found preconditioning 'mean_flow' for objective 'ect', which needs f\(x, sigma_min\) = x",
        ),
        ({"preconditioning": "trig"}, "found preconditioning 'trig'"),
        ({"objective.name": "imm"}, "found objective 'imm'"),
        ({"time": "flow"}, "found time 'flow'"),
        ({"model.network": "vit"}, "found network 'vit', expected one of .'dit', 'function', 'unet', 'uvit'"),
        ({"model.network": "unet"}, "found U-Net 'tiny', expected one of .*'adm_64'"),
        (
            {"model.network": "unet", "model.preset": "ncsnpp_32", "model.unet.groups": 3},
            "found groups for U-Net 'ncsnpp_32', which has none",
        ),
        (
            DERIVATIVES["sct"] | {"model.network": "unet", "model.preset": "ncsnpp_32"},
            "found a level embedding of 101 radians .*fourier_scale=0.02",
        ),
        (
            {"model.network": "unet", "model.preset": "ncsnpp_32", "model.qk_norm": True},
            "found model.qk_norm with network 'unet'",
        ),
        ({"model.network": "uvit", "model.norm": "rms"}, "found model.norm with network 'uvit'.*model.norm='layer'"),
        ({"model.network": "uvit", "model.rotary": True}, "found model.rotary with network 'uvit'.*rotary=False"),
        (
            {"model.network": "unet", "model.preset": "ncsnpp_32", "model.mlp": "swiglu"},
            "found model.mlp with network 'unet', which has no such choice; set config.model.mlp='gelu'",
        ),
        ({"model.norm": "batch"}, "found norm 'batch', expected one of .'layer', 'rms'.; change config.model.norm"),
        ({"model.network": "dit", "model.mlp": "relu"}, "found mlp 'relu', expected one of .'gelu', 'swiglu'."),
        (
            {"model.network": "dit", "task": "reconstruction"},
            "found pre-training of network 'dit', expected 'function'",
        ),
        (
            {"model.preset": "XXL"},
            "found preset 'XXL' of network 'function', expected one of .*; change config.model.preset",
        ),
        ({"model.function": "9x9"}, "found function preset '9x9'"),
        ({"model.groups": 5}, "found 5 groups for 16 columns"),
        ({"noise.sigma_min": 100.0}, "expected 0 < sigma_min < sigma_max"),
        ({"task": "diffusion"}, "found task 'diffusion', expected one of .*; change config.task"),
    ],
)
def test_configs_that_cannot_be(tiny_task, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(changes)


def test_bytes_become_minus_one_to_one():
    np.testing.assert_allclose(to_float(jnp.asarray([0, 51, 255], jnp.uint8)), [-1, -0.6, 1], atol=1e-6)
