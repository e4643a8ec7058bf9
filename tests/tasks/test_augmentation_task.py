"""The classifier of augmentations as a task: what it learns, and on what its labels depend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import augmentation_net
from fid_imagegen import tasks
from fid_imagegen.data import pipeline, sources

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def task():
    config = augmentation_net.get_config("runlocal").unlock()
    config.model.widths = (8, 16)
    return tasks.build(config.lock())


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(KEY)[0]


def digits(task, held_out):
    data = task.config.data
    source = sources.make_source(data, held_out=held_out)
    return jnp.asarray(pipeline.examples(source, data, range(len(source))))


def test_it_knows_the_augmentations_of_images_it_has_not_seen(task, params):
    images, optimizer = digits(task, False), optax.adam(6e-3)

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(KEY, number)
        batch = {"image": jax.random.choice(key, images, (48,)), "row": jnp.arange(48)}
        grads, _ = jax.grad(lambda p: task.loss(p, {}, batch, key, number), has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    unseen = digits(task, True)
    batch = {"image": unseen, "row": jnp.arange(len(unseen))}
    measure = jax.jit(lambda params: task.loss(params, {}, batch, KEY, 0))
    before, (_, chance) = measure(params)
    trained, state = params, optimizer.init(params)
    for number in range(100):
        trained, state = step(trained, state, number)
    after, (_, found) = measure(trained)
    assert chance["accuracy"] < 2 / 13 and found["accuracy"] > 4 / 13 and after < before - 0.8


def test_labels_and_strengths_follow_the_row_and_not_the_place(task, params):
    one = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(np.stack([one] * 6)), "row": jnp.arange(6)}  # of one image: mixed, it is itself
    loss = jax.jit(lambda batch, key: task.loss(params, {}, batch, key, 0)[0])
    whole = float(loss(batch, KEY))
    assert float(loss(batch | {"row": batch["row"][::-1]}, KEY)) == pytest.approx(whole, rel=1e-5)
    assert float(loss(batch | {"row": batch["row"] + 6}, KEY)) != pytest.approx(whole, rel=1e-3)
    assert float(loss(batch, jax.random.key(1))) != pytest.approx(whole, rel=1e-3)


def test_previews_show_every_augmentation_beside_its_image(task, params):
    images = digits(task, True)[:14]
    sheet = np.asarray(jax.jit(task.preview)(params, {"image": images})["augmented"])
    clean, made = sheet[::2], sheet[1::2]
    np.testing.assert_allclose(clean, images / 127.5 - 1, atol=1e-6)
    same = [np.array_equal(*pair) for pair in zip(clean, made, strict=True)]
    assert same == [True] + 12 * [False] + [True]
    np.testing.assert_allclose(made[1], clean[1, ::-1], atol=1e-6)  # label 1 of 13: upside down
