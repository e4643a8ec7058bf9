"""Tiny generators of the digits' size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen import tasks


@pytest.fixture(scope="session")
def tiny_task():
    """tiny_task({"model.dropout": 0.5, ...}) -> a task of a tiny config with these changes."""

    def make(changes=()):
        config = common.base()
        config.model.function, config.variational = "5x64", True  # global, the kind of most fields
        common.runlocal(config)
        config.data.update({"source": "digits", "image_size": 8, "channels": 1})
        config.model.update({"patch": 4, "width": 16, "weight_update": "scale"})
        config.update_from_flattened_dict(dict(changes))
        return tasks.build(config.lock())

    return make


@pytest.fixture(scope="session")
def random_params():
    """random_params(task) -> its groups, every parameter drawn, the gates too: nothing is the identity any more."""

    def make(task, seed=0, deviation=0.3):
        generator = np.random.default_rng(seed)
        draw = lambda x: jnp.asarray(deviation * generator.standard_normal(x.shape), jnp.float32)  # noqa: E731
        return jax.tree.map(draw, jax.eval_shape(lambda: task.init(jax.random.key(0))[0]))

    return make


@pytest.fixture(scope="session")
def batch():
    """A batch of four, as the loop hands it over."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.asarray([0, 1, 2, 1]), "row": jnp.arange(4)}
