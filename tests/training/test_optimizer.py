import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from fid_imagegen.training import ema, optimizer


def rates(steps, num_steps=20, **changes):
    schedule = optimizer.schedule(common.optimizer("adam", 0.5, **changes), num_steps)
    return np.array([schedule(step) for step in range(steps)])


def test_a_constant_rate_after_a_warm_up_that_learns_from_its_first_step():
    np.testing.assert_allclose(rates(8, warmup_steps=5), [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates(3, warmup_steps=1), 0.5)
    np.testing.assert_allclose(rates(3), 0.5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_and_linear_reach_zero_at_the_last_step(warmup):
    done = np.arange(20 - warmup + 1) / (20 - warmup)
    cosine = rates(21, schedule="cosine", warmup_steps=warmup)[warmup:]
    np.testing.assert_allclose(cosine, 0.25 * (1 + np.cos(np.pi * done)), atol=1e-7)
    linear = rates(21, schedule="linear", warmup_steps=warmup)[warmup:]
    np.testing.assert_allclose(linear, 0.5 * (1 - done), atol=1e-7)


def updates(transformation, params, steps=8):
    """Parameters after steps on gradients that differ from step to step."""
    step = jax.jit(transformation.update)
    state = transformation.init(params)
    for number in range(steps):
        change, state = step({"w": jnp.sin(params["w"] + number)}, state, params)
        params = optax.apply_updates(params, change)
    return params["w"]


@pytest.mark.parametrize(
    ("name", "peer", "changes"),
    [
        ("radam", optax.radam(0.5, b1=0.8, b2=0.95, eps=1e-6), {}),
        ("adam", optax.adam(0.5, b1=0.8, b2=0.95, eps=1e-6), {}),
        ("adamw", optax.adamw(0.5, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), {"weight_decay": 0.1}),
        (
            "adam",
            optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.5, b1=0.8, b2=0.95, eps=1e-6)),
            {"grad_clip": 0.3},
        ),
    ],
)
def test_every_field_reaches_optax(name, peer, changes):
    params = {"w": jnp.linspace(-1, 1, 7)}
    ours = optimizer.build(common.optimizer(name, 0.5, b1=0.8, b2=0.95, eps=1e-6, **changes), 20)
    np.testing.assert_array_equal(updates(ours, params), updates(peer, params))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (common.optimizer("sgd", 1.0), r"optimizer 'sgd', expected one of \['adam', 'adamw', 'radam'\]"),
        (common.optimizer("adam", 1.0, schedule="step"), "schedule 'step', expected one of"),
        (common.optimizer("radam", 1.0, weight_decay=0.1), "weight decay 0.1 with radam, expected adamw"),
    ],
)
def test_what_cannot_be_built_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        optimizer.build(config, 10)


def test_every_group_has_one_optimizer(tiny):
    with pytest.raises(ValueError, match=r"optimizers for \['generator'\], expected \['critic', 'generator'\]"):
        optimizer.build_all(tiny(), ("generator", "critic"))


def test_an_average_has_its_closed_form():
    values, average = [jnp.float32(v) for v in (3.0, -1.0, 2.0, 5.0)], {"w": jnp.float32(1.0)}
    for value in values:
        average = ema.update(average, {"w": value}, jnp.float32(0.9))
    expected = 0.9**4 * 1.0 + sum(0.1 * 0.9 ** (3 - i) * float(value) for i, value in enumerate(values))
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


def test_the_decay_warms_up():
    decays = np.array([ema.warm_decay(0.99, jnp.int32(step)) for step in (0, 1, 8, 890, 10_000)])
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 0.5, 0.99, 0.99], rtol=1e-6)
    assert ema.name(0.9999) == "0.9999" and ema.name(0.5) == "0.5"


@pytest.mark.parametrize("decay", [1.5, 1.0, -0.1])
def test_decays_are_told_apart_and_lie_between_none_and_all(decay):
    config = ConfigDict({"ema_decays": (0.9999999, 0.99999999), "ema_widths": (), "ema_snapshots": 0})
    assert len(ema.averages(config)) == 2
    config.ema_decays = (0.9, decay)
    with pytest.raises(ValueError, match=f"found an EMA decay of {decay}, expected 0 to below 1"):
        ema.averages(config)
