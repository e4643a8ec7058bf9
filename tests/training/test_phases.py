"""A config of several stages: one after the other, each free to start from those before."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from fid_imagegen.training import runs
from fid_imagegen.training.checkpoint import load_groups
from fid_imagegen.training.phases import run


def staged(toy, **second):
    first, second = toy(num_steps=4), toy(**{"num_steps": 2, "init.generator": "../first", "seed": 7} | second)
    return ConfigDict({"stages": ("first", "second"), "first": first, "second": second}).lock()


def test_stages_train_in_order_and_start_from_those_before(toy, tmp_path):
    assert run(staged(toy, **{"optimizers.generator.learning_rate": 0.0}), tmp_path)
    assert load_groups(tmp_path / "first")[0] == 4 and load_groups(tmp_path / "second")[0] == 2
    # At a rate of zero the second stage still is where it began: at the first one's average.
    _, first = runs.read_params(tmp_path / "first")
    step, second = load_groups(tmp_path / "second")
    np.testing.assert_array_equal(second["params"]["generator"]["kernel"], first["generator"]["kernel"])
    tmp_path.rename(tmp_path.with_name("moved"))
    assert run(staged(toy, **{"optimizers.generator.learning_rate": 0.0}), tmp_path.with_name("moved"))


def test_a_stage_that_was_stopped_ends_the_sequence_until_it_is_resumed(toy, tmp_path, stop_at):
    stop_at(2)
    assert not run(staged(toy), tmp_path)
    assert not (tmp_path / "second").exists()
    stop_at(None)
    assert run(staged(toy), tmp_path)


@pytest.mark.parametrize("wrong", [{"task": "stage_d"}, {"optimizers.generator.name": "sgdd"}])
def test_a_mistake_in_a_later_stage_shows_before_the_first_is_trained(toy, tmp_path, wrong):
    with pytest.raises(ValueError, match="found .*(stage_d|sgdd).*expected"):
        run(staged(toy, **wrong), tmp_path)
    assert not list(tmp_path.iterdir())


def test_statistics_are_read_with_the_parameters(toy, tmp_path):
    assert run(staged(toy), tmp_path)
    _, groups = runs.read_params(tmp_path / "first")
    assert set(groups) == {"generator", "seen"} and jax.tree.leaves(groups["seen"])
