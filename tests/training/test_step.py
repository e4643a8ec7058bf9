import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.training import ema, state
from fid_imagegen.training.loop import Run


def advance(config, folder, steps=1):
    """(initial state as numpy, states after each step, metrics of each step)."""
    run = Run(config, folder)
    with jax.set_mesh(run.mesh):
        current, batches = run.initial(), run.batches(0)
        first, states, metrics = jax.tree.map(np.asarray, current), [], []
        for _ in range(steps):
            current, values = run.step(current, run.frozen, next(batches), run.key)
            states.append(jax.tree.map(np.asarray, current))
            metrics.append(jax.tree.map(np.asarray, values))
        batches.close()
    return first, states, metrics


def distance(a, b):
    """Largest difference of two trees, relative to the largest value."""
    a, b = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (a, b))
    pairs = list(zip(a, b, strict=True))
    return max(np.max(np.abs(x - y)) for x, y in pairs) / max(np.max(np.abs(x)) for x, _ in pairs)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(toy, tmp_path, parts):
    _, whole, first = advance(toy(), tmp_path, 3)
    _, dealt, second = advance(toy(accumulate=parts), tmp_path, 3)
    for a, b in zip(first, second, strict=True):
        assert distance(a, b) < 1e-6
    assert distance(whole[-1].params, dealt[-1].params) < 1e-6
    assert distance(whole[-1].opt_state, dealt[-1].opt_state) < 1e-6
    assert distance(whole[-1].model_state, dealt[-1].model_state) < 1e-6


def test_accumulation_notices_noise_that_follows_the_micro_batch(toy, tmp_path, monkeypatch):
    """The test above with a planted fault: rows numbered within the micro-batch."""
    _, _, whole = advance(toy(), tmp_path)
    deal = state.rearrange
    monkeypatch.setattr(state, "rearrange", lambda x, *a, **k: deal(x, *a, **k) if x.ndim > 1 else deal(x % 4, *a, **k))
    _, _, dealt = advance(toy(accumulate=2), tmp_path)
    assert distance(whole, dealt) > 1e-3


def test_a_generator_accumulates_too(tiny, devices, tmp_path):
    devices(1)
    run = Run(tiny(objective_name="ect"), tmp_path)
    batch = next(run.batches(0)) | {"row": jnp.arange(8)}

    def gradients(params, frozen, batch, key):
        loss = lambda params: run.task.loss(params, {}, batch, key, jnp.int32(0))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    def accumulated(params, parts):
        return state._accumulate(gradients, params, {}, batch, run.key, parts)

    params, _ = jax.jit(run.task.init)(run.key)
    (loss, _), whole = jax.jit(accumulated, static_argnums=1)(params, 1)
    (same, _), dealt = jax.jit(accumulated, static_argnums=1)(params, 4)
    assert distance(loss, same) < 1e-6
    assert distance(whole, dealt) < 2e-6


def test_averages_and_targets_follow_the_parameters(toy, tmp_path):
    first, states, _ = advance(toy(ema_decays=(0.0, 0.15, 0.999)), tmp_path, 4)
    kernel = lambda tree: tree["generator"]["kernel"]  # noqa: E731
    for decay in (0.0, 0.15, 0.999):
        average = kernel(first.params)
        for step, after in enumerate(states):
            warm = min(decay, (1 + step) / (10 + step))
            average = warm * average + (1 - warm) * kernel(after.params)
            np.testing.assert_allclose(kernel(after.ema[ema.name(decay)]), average, rtol=1e-5, atol=1e-7)
    target = kernel(first.params)
    for after in states:
        target = 0.5 * target + 0.5 * kernel(after.params)
        np.testing.assert_allclose(after.tracked["target"]["kernel"], target, rtol=1e-5, atol=1e-7)
    assert [int(after.step) for after in states] == [1, 2, 3, 4]


def test_the_state_is_donated(toy, tmp_path):
    run = Run(toy(), tmp_path)
    with jax.set_mesh(run.mesh):
        before = run.initial()
        after, _ = run.step(before, run.frozen, next(run.batches(0)), run.key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("bad", ["loss", "gradient", "parameters"])
def test_the_finite_flag_covers_loss_gradient_and_parameters(toy, tmp_path, bad):
    config = toy(**({"optimizers.generator.learning_rate": 3e38} if bad == "parameters" else {}))
    if bad == "loss":
        toy.loss = lambda params, x, step: jnp.mean(params["kernel"]) / jnp.where(step == 1, 0.0, 1.0)
    elif bad == "gradient":  # the square root's slope at 0; the loss itself is finite
        toy.loss = lambda params, x, step: jnp.mean(
            jnp.sqrt(jnp.square(params["kernel"]) * jnp.where(step == 1, 0.0, 1.0))
        )
    _, _, metrics = advance(config, tmp_path, 2)
    assert not metrics[1 if bad != "parameters" else 0]["finite"]
    assert bad == "loss" or np.isfinite(metrics[1 if bad == "gradient" else 0]["loss"])
    assert bad == "parameters" or metrics[0]["finite"]


def test_bfloat16_computes_and_float32_parameters_learn(tiny, devices, tmp_path):
    devices(1)
    config = {"task": "reconstruction", "optimizers.generator.learning_rate": 1e-3}
    first, states, metrics = advance(tiny(**config, **{"model.dtype": "bfloat16"}), tmp_path, 30)
    for tree in (first, states[-1]):
        floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
    losses = [float(values["loss"]) for values in metrics]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    exact = Run(tiny(**config), tmp_path)
    batch, key = next(exact.batches(0)), jax.random.fold_in(exact.key, 0)
    loss, _ = jax.jit(exact.task.loss)(first.params, {}, batch, key, 0)
    assert 1e-6 < abs(losses[0] / loss - 1) < 0.05  # rounded somewhere, wrong nowhere
