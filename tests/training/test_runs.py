import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.training import runs, warm_start
from fid_imagegen.training.loop import Run, train


def test_the_resolved_config_is_read_back_as_written(tiny, tmp_path):
    config = tiny()
    runs.write_config(tmp_path / "run", config)
    assert runs.read_config(tmp_path / "run").to_dict() == json.loads(config.to_json())
    with pytest.raises(FileNotFoundError, match=r"found no .*config\.json, expected a work directory or an exported"):
        runs.read_config(tmp_path)


def test_a_work_directory_belongs_to_one_config(tiny, tmp_path):
    runs.write_config(tmp_path, tiny())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="found another config in .*; expected the same; resume with that") as error:
        runs.write_config(
            tmp_path, tiny(batch_size=16, accumulate=2, **{"optimizers.generator.b2": 0.5, "log.every": 7})
        )
    assert "batch_size: 8 there, 16 now" in str(error.value)
    assert "accumulate: 1 there, 2 now" in str(error.value)  # BatchNorm takes the statistics of each part
    assert "optimizers.generator.b2: 0.999 there, 0.5 now" in str(error.value)
    assert "log.every" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_keys_that_are_new_or_gone_differ_too(tiny, tmp_path):
    runs.write_config(tmp_path, tiny(objective_name="ct"))
    with pytest.raises(
        ValueError, match=r"objective\.k: '\(absent\)' there, 8\.0 now.*objective\.mu0: 0\.9 there, '\(absent\)'"
    ):
        runs.write_config(tmp_path, tiny(objective_name="ect"))


def test_where_it_runs_and_what_it_reports_may_change(tiny, tmp_path):
    runs.write_config(tmp_path, tiny())
    free = {"mesh.data": 4, "checkpoint.every": 9, "log.every": 9, "profile.steps": 2}
    runs.write_config(tmp_path, tiny(**free, **{"sharding.min_size": 5}))
    assert runs.read_config(tmp_path).checkpoint.every == 9
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_config_that_cannot_run_writes_nothing(toy, tmp_path):
    for changes in ({"distance": "l3", "task": "consistency"}, {"model.num_classes": 3}, {"data.source": "nothing"}):
        with pytest.raises(ValueError, match="found .*expected"):
            train(toy(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


OURS = {"generator": {"a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "b": jnp.zeros(4)}}


def export(folder, tree, config):
    folder.mkdir()
    runs.write_config(folder, config)
    save_tree(folder / "model.safetensors", {"generator": tree}, {})
    return str(folder)


def test_a_group_is_filled_from_an_exported_folder(tiny, tmp_path):
    theirs = {"a": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.ones(3)}, "b": np.full(4, 2.0)}
    filled = warm_start.fill(OURS, {"generator": export(tmp_path / "a", theirs, tiny())}, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, filled["generator"], theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(filled)} == {np.dtype(np.float32)}
    assert warm_start.fill(OURS, {"generator": ""}, tmp_path)["generator"] is OURS["generator"]


def test_all_that_does_not_fit_is_listed_at_once(tiny, tmp_path):
    theirs = {"a": {"kernel": np.zeros((3, 2))}, "b": np.zeros(4), "c": np.zeros(1), "d": np.zeros(2)}
    folder = export(tmp_path / "a", theirs, tiny())
    with pytest.raises(ValueError, match="do not fit this model") as error:
        warm_start.fill(OURS, {"generator": folder}, tmp_path)
    for problem in (
        "missing a/bias (3,)",
        "extra c (1,)",
        "extra d (2,)",
        "a/kernel has shape (3, 2), expected (2, 3)",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"critic": "x"}, r"found config\.init\.critic, expected one of the groups \['generator'\]"),
        ({"generator": "nowhere"}, "found no nowhere/config.json"),
    ],
)
def test_groups_and_folders_that_do_not_exist_are_named(init, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        warm_start.check_names(init, OURS)
        warm_start.fill(OURS, init, tmp_path)


@pytest.mark.parametrize("root", ["/somewhere", "gs://bucket"])
def test_folders_beside_a_work_directory_move_with_it(root):
    workdir = epath.Path(root) / "run" / "stage_b"
    assert str(warm_start.inside("../stage_a", workdir)) == f"{root}/run/stage_a"
    assert str(warm_start.inside("./pretrain", workdir)) == f"{root}/run/stage_b/pretrain"
    assert str(warm_start.inside("elsewhere/run", workdir)) == "elsewhere/run"


def test_the_folder_beside_the_current_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert warm_start.inside("../stage_a", epath.Path(".")) == tmp_path.parent / "stage_a"


def test_a_frozen_group_without_weights_is_named(toy, tmp_path):
    toy.frozen = {"teacher": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"found no weights for the frozen group 'teacher'.*set config\.init\.teacher"):
        Run(toy(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_group_is_refused(tiny, tmp_path):
    folder = export(tmp_path / "a", OURS["generator"], tiny())
    ours = OURS | {"critic": {}}
    with pytest.raises(
        ValueError, match=r"found groups \['generator'\] in .*, expected critic; change config.init.critic"
    ):
        warm_start.fill(ours, {"critic": folder}, tmp_path)


def test_a_run_starts_from_the_average_of_another(toy, tmp_path):
    train(toy(), tmp_path / "first")
    _, average = runs.read_params(tmp_path / "first")
    run = Run(toy(seed=5, **{"init.generator": str(tmp_path / "first")}), tmp_path / "second")
    with jax.set_mesh(run.mesh):
        state = run.initial()
    for tree in (state.params["generator"], state.tracked["target"], state.ema["0.9"]["generator"]):
        np.testing.assert_array_equal(tree["kernel"], average["generator"]["kernel"])
    other = Run(toy(seed=5), tmp_path / "third")
    with jax.set_mesh(other.mesh):
        assert not np.array_equal(other.initial().params["generator"]["kernel"], average["generator"]["kernel"])
