"""A consistency model of points in the plane that really learns: images of 1x1 pixel with 2 channels, a small MLP as net."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fid_imagegen.diffusion import objectives
from fid_imagegen.diffusion.distances import pseudo_huber
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.preconditioning import consistency_function, preconditioning
from fid_imagegen.diffusion.samplers import last_input

NOISE = NoiseRange(sigma_max=20.0)
FORM = preconditioning("x0_blend")
STEPS, BATCH, WIDTH, RADIUS = 3000, 256, 64, 0.7


def net(params, x, levels_BK, cond, *, key=None):
    h = jnp.concatenate([x.reshape(-1, 2), levels_BK, jnp.sin(4 * levels_BK), jnp.cos(4 * levels_BK)], axis=1)
    for kernel, bias in params[:-1]:
        h = jnp.tanh(h @ kernel + bias)
    return (h @ params[-1][0] + params[-1][1]).reshape(x.shape)


def ring(key, count):
    angle = jax.random.uniform(key, (count,), maxval=2 * jnp.pi)
    return RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)[:, None, None]


@pytest.fixture(scope="module")
def trained():
    sizes = [5, WIDTH, WIDTH, WIDTH, 2]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    params = [(jax.random.normal(k, (i, o)) / np.sqrt(i), jnp.zeros(o)) for k, i, o in pairs]
    objective = objectives.build(
        "ect", noise=NOISE, form=FORM, distance=pseudo_huber, num_steps=STEPS, stages=4, log_mean=-0.5
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(carry, number):
        params, state = carry
        data, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), number))

        def loss(params):
            student = lambda *args, key: net(params, *args, key=key)  # noqa: E731
            keys = example_keys(noise, jnp.arange(BATCH))
            x0 = ring(data, BATCH)
            return objective({"student": student}, x0, None, keys=keys, key=noise, step=number)[0].mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(STEPS))[0][0])
    return params, run(params)


def samples(params, steps=1):
    denoise = lambda x, sigma: consistency_function(  # noqa: E731
        lambda *args, key: net(params, *args, key=key), x, sigma, None, key=None, noise=NOISE, form=FORM
    )
    keys = example_keys(jax.random.key(2), jnp.arange(1000))
    return np.asarray(denoise(*last_input(denoise, keys, (1, 1, 2), steps=steps, noise=NOISE))).reshape(-1, 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_samples_lie_on_the_ring(trained, steps):
    """A denoiser would answer the mean, 0, to pure noise; so would a consistency model without its target."""
    before, after = (np.linalg.norm(samples(params, steps), axis=1) for params in trained)
    assert np.mean(np.abs(before - RADIUS) < 0.15) < 0.4
    assert np.mean(np.abs(after - RADIUS) < 0.15) > 0.8


def test_samples_go_all_the_way_round(trained):
    x = samples(trained[1])
    octants = np.bincount((4 * (np.arctan2(*x.T) / np.pi + 1)).astype(int) % 8, minlength=8) / len(x)
    assert octants.min() > 0.06
