"""Generators of points in the plane that really learn: images of 1x1 pixel with 2 channels, a small MLP as net."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fid_imagegen.diffusion import objectives
from fid_imagegen.diffusion.distances import l2, pseudo_huber
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.preconditioning import consistency_function, flow_map, preconditioning
from fid_imagegen.diffusion.samplers import SAMPLERS

NOISE = NoiseRange(sigma_max=20.0)
STEPS, BATCH, WIDTH, RADIUS = 3000, 256, 64, 0.7
# name: (form, time, what it starts from, learning rate, fields)
RUNS = {
    "ect": ("x0_blend", "log", None, 3e-3, {"stages": 4, "log_mean": -0.5}),
    "edm": ("edm", "angle", None, 3e-3, {"log_mean": -0.5}),
    "cd": ("edm", "angle", "edm", 1e-3, {}),
    "sct": ("edm", "angle", "edm", 1e-3, {"warmup": 1000, "log_mean": -0.5}),
    "meanflow": ("mean_flow", "log", None, 3e-3, {"instant": 0.5}),
}


def net(params, x, levels_BK, cond, *, key=None):
    h = jnp.concatenate([x.reshape(-1, 2), levels_BK, jnp.sin(4 * levels_BK), jnp.cos(4 * levels_BK)], axis=1)
    for kernel, bias in params[:-1]:
        h = jnp.tanh(h @ kernel + bias)
    return (h @ params[-1][0] + params[-1][1]).reshape(x.shape)


def ring(key, count):
    angle = jax.random.uniform(key, (count,), maxval=2 * jnp.pi)
    return RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)[:, None, None]


def fresh(levels):
    sizes = [2 + 3 * levels, WIDTH, WIDTH, WIDTH, 2]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return [(jax.random.normal(k, (i, o)) / np.sqrt(i), jnp.zeros(o)) for k, i, o in pairs]


@functools.cache
def trained(name):
    """(the objective, parameters before, after)."""
    form, time, start, rate, fields = RUNS[name]
    common = {"noise": NOISE, "form": preconditioning(form, time), "num_steps": STEPS}
    objective = objectives.build(name, distance=pseudo_huber if name == "ect" else l2, **common, **fields)
    teacher = trained(start)[2] if start else None
    begin = teacher or fresh(len(objective.form.times))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, STEPS)))

    def step(teacher, carry, number):
        params, state = carry
        data, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), number))

        def loss(params):
            nets = {"student": functools.partial(net, params), "teacher": functools.partial(net, teacher)}
            keys = example_keys(noise, jnp.arange(BATCH))
            return objective(nets, ring(data, BATCH), None, keys=keys, key=noise, step=number)[0].mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(begin, teacher):  # an argument: XLA multiplies by constants in plain loops, many times slower
        first = (begin, optimizer.init(begin))
        return jax.lax.scan(functools.partial(step, teacher), first, jnp.arange(STEPS))[0][0]

    return objective, begin, run(begin, teacher)


def samples(objective, params, sampler, steps):
    bound = functools.partial(net, params)
    common = {"cond": None, "key": None, "noise": NOISE, "form": objective.form}
    denoise = lambda x, *levels: (flow_map if levels[1:] else consistency_function)(bound, x, *levels, **common)  # noqa: E731
    keys = example_keys(jax.random.key(2), jnp.arange(1000))
    draw = jax.jit(lambda: denoise(*SAMPLERS[sampler](denoise, keys, (1, 1, 2), steps=steps, noise=NOISE)))
    return np.asarray(draw()).reshape(-1, 2)


def on_ring(x):
    return np.mean(np.abs(np.linalg.norm(x, axis=1) - RADIUS) < 0.15)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ect", 1),
        ("ect", 2),
        ("cd", 1),
        ("cd", 2),
        ("sct", 1),
        ("sct", 2),
        ("meanflow", 1),
        ("meanflow", 2),
        ("edm", 18),
    ],
)
def test_samples_lie_all_round_the_ring(name, steps):
    """A denoiser would answer the mean, 0, to pure noise; so would a consistency model without its target."""
    objective, before, after = trained(name)
    found = samples(objective, after, objective.sampler, steps)
    print(name, steps, on_ring(found))
    assert on_ring(found) > 0.8
    if name not in ("cd", "sct"):
        assert on_ring(samples(objective, before, objective.sampler, steps)) < 0.4
    octants = np.bincount((4 * (np.arctan2(*found.T) / np.pi + 1)).astype(int) % 8, minlength=8) / len(found)
    print(octants)
    assert octants.min() > 0.06


def test_one_step_of_the_diffusion_model_is_the_mean():
    """What the consistency objectives start from does not lie on the ring: it is they that put it there."""
    objective, _, after = trained("edm")
    found = samples(objective, after, "consistency", 1)
    assert np.abs(found.mean(0)).max() < 0.1 and on_ring(found) < 0.1
