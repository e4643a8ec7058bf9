"""A config of several stages: one after the other, each free to start from those before."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import wuerstchen
from fid_imagegen.training import runs
from fid_imagegen.training.checkpoint import load_groups
from fid_imagegen.training.loop import Run
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


@pytest.mark.parametrize(
    "wrong", [{"task": "stage_d"}, {"optimizers.generator.name": "sgdd"}, {"data.source": "nothing"}]
)
def test_a_mistake_in_a_later_stage_shows_before_the_first_is_trained(toy, tmp_path, wrong):
    with pytest.raises(ValueError, match="found .*(stage_d|sgdd|nothing).*expected"):
        run(staged(toy, **wrong), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_c.init.nonsense": "../stage_a"}, "found config.init.nonsense"),
        ({"stage_c.text.encoder": "L", "stage_c.text.weights": "nowhere"}, "nowhere"),
        ({"previewer.objective.perceptual": "lpips"}, "vgg16"),
        ({"stage_b.compressor.weights": "nowhere.pth"}, "found config.compressor.weights 'nowhere.pth'"),
    ],
)
def test_missing_weights_show_before_the_first_stage_is_trained(tmp_path, changes, message):
    config = wuerstchen.get_config("previewer,runlocal").unlock()
    config.stage_c.init.nonsense = ""
    config.update_from_flattened_dict(changes)
    if config.stage_c.text.encoder != "small":
        del config.stage_c.optimizers.text
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config.lock(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_statistics_come_with_the_group_that_a_stage_starts_from(random_stages, tmp_path, devices):
    devices(1)
    config, groups = runs.read_params(random_stages / "stage_b")
    groups["compressor_stats"] = jax.tree.map(lambda leaf: np.full_like(leaf, 7), groups["compressor_stats"])
    runs.write_params(tmp_path / "earlier", config, groups)
    shutil.copytree(random_stages / "stage_a", tmp_path / "stage_a")
    config.init.update({"stage_b": "../earlier", "compressor": "../earlier", "vqgan": "../stage_a"})
    made = Run(config.lock(), tmp_path / "later")
    with jax.set_mesh(made.mesh):
        state = made.initial()
    assert all(np.all(np.asarray(leaf) == 7) for leaf in jax.tree.leaves(state.model_state["compressor_stats"]))
    np.testing.assert_array_equal(
        jax.tree.leaves(state.params["compressor"])[0], jax.tree.leaves(groups["compressor"])[0]
    )


def test_statistics_are_read_with_the_parameters(toy, tmp_path):
    assert run(staged(toy), tmp_path)
    _, groups = runs.read_params(tmp_path / "first")
    assert set(groups) == {"generator", "seen"} and jax.tree.leaves(groups["seen"])
