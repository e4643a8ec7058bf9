"""Stages B and C on eight devices against one, everything cut that divides."""

import jax
import numpy as np
import pytest
from test_equality import Trained, difference

from configs import wuerstchen

STEPS = 4


@pytest.mark.parametrize("stage", [pytest.param("stage_b", marks=pytest.mark.slow), "stage_c"])
def test_eight_devices_give_the_losses_of_one(stage, random_stages):
    def config(**changes):
        made = wuerstchen.get_config("runlocal")[stage]
        made.unlock()
        made.update_from_flattened_dict(changes | {"sharding.min_size": 0})
        return made.lock()

    one, eight = (Trained(config, shape, random_stages / f"{stage}_run") for shape in ((1, 1, 1), (2, 4, 1)))
    with jax.set_mesh(one.run.mesh):
        start = jax.tree.map(np.asarray, one.run.initial())
    cut = [leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(eight.place(start).params)]
    assert np.mean(cut) > 0.5
    losses = one.train(one.place(start), 0, STEPS)[1]
    assert difference(eight.train(eight.place(start), 0, STEPS)[1], losses) <= 1e-5
    other = one.train(one.place(start), 1, STEPS + 1)[1]
    assert difference(other, losses) > 1e-3  # other records and noise show
