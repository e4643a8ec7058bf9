"""Sweeps and their combinators, work units' names, the command line's planning and its refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import run, sweep
from launch.errors import LaunchError
from launch.experiment import MAX_NAME, create_experiment, unit_name

A, B = [{"a": 1}, {"a": 2}], [{"b": 3}, {"b": 4}]


def test_combinators():
    assert sweep.product(A, B) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert sweep.product() == [{}]
    assert sweep.zip_(A, B) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert sweep.chain(A, B) == A + B
    assert sweep.product(sweep.fixed({"c": 0}), A) == [{"c": 0, "a": 1}, {"c": 0, "a": 2}]


def test_combinators_refuse():
    with pytest.raises(LaunchError, match=r"two values of 'a'.*1 and 2"):
        sweep.product(A, A)
    with pytest.raises(LaunchError, match=r"lengths \[2, 1\]"):
        sweep.zip_(A, B[:1])
    assert sweep.product([{"a": 1}], [{"a": 1}]) == [{"a": 1}]  # the same value twice says nothing new


def test_the_order_of_names_is_the_order_of_the_product(config):
    names = [unit.name for unit in create_experiment(config, ["lr", "seed"]).units]
    assert names == [
        "001-learning_rate=0.001,seed=0",
        "002-learning_rate=0.001,seed=1",
        "003-learning_rate=0.0003,seed=0",
        "004-learning_rate=0.0003,seed=1",
    ]
    assert create_experiment(config, ["seed", "lr"]).units[1].name == "002-seed=0,learning_rate=0.0003"
    assert [unit.name for unit in create_experiment(config).units] == ["001"]


def test_names_are_safe_short_and_distinct():
    assert unit_name(1, {"a.x": 1, "b.x": 2}) == "001-a.x=1,b.x=2"
    assert unit_name(12, {"data.dir": "/data/my set"}) == "012-dir=_data_my_set"
    long = [unit_name(1, {"prompt": "x" * 200 + end}) for end in "ab"]
    assert len(set(long)) == 2 and {len(name) for name in long} == {MAX_NAME}
    assert long[0] == unit_name(1, {"prompt": "x" * 200 + "a"})


def test_work_directories(config):
    unit = create_experiment(config, root="/r", name="e").units[0]
    assert (unit.workdir, unit.records) == ("/r/e/001", Path("/r/e/001"))
    unit = create_experiment(config, root="gs://bucket/r/").units[0]
    assert (unit.workdir, unit.records) == ("gs://bucket/r/toy/001", Path("runs/toy/001"))


def test_list_prints_and_writes_nothing(config, tmp_path, capsys):
    root = tmp_path / "runs"
    line = ["--config", f"{config}:runlocal", "--sweep", "lr", "--root", str(root), "--list", "--config.steps=3"]
    assert run.main(line) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{root}/toy/001-learning_rate=0.001  --config.steps=3 --config.optimizer.learning_rate=0.001",
        f"{root}/toy/002-learning_rate=0.0003  --config.steps=3 --config.optimizer.learning_rate=0.0003",
    ]
    assert not root.exists()


@pytest.mark.parametrize(
    "line, found, expected",
    [
        (["--sweep", "lrr"], "sweep 'lrr'", "lr, seed, same"),
        (["--sweep", "empty"], "sweep 'empty' without points", "at least one"),
        (["--sweep", "key"], "override of 'optimizer.learning_rat'", "such as optimizer.learning_rate"),
        (["--sweep", "seed,same"], "two values of 'seed' in one work unit: 0 and 1", "different keys"),
        (["--sweep", "type"], "invalid literal for int", "values of the types"),
        (["--sweep", "list"], "not supported for overriding", "values of the types"),
        (["--sweep", "text"], "mode=7, which arrives in the trainer as '7'", "the type of 'ok'"),
        (["--sweep", "seed", "--config.seed=3"], "seed both swept and on the command line", "one source"),
        (["--config.sed=3"], "override of 'sed'", "such as seed"),
        (["--config.optimizer=3"], "override of 'optimizer'", "optimizer.learning_rate"),
        (["--config.seed=three"], "invalid literal for int", "values of the types"),
        (["--config.seed=1", "--config.seed=2"], "--config.seed twice", "one value"),
        (["--config.seed"], "argument '--config.seed'", "--config.KEY=VALUE"),
        (["--sweeps", "lr"], "argument '--sweeps'", "a flag of --help"),
        (["--executor", "borg"], "executor 'borg'", "one of local, slurm, tpu_vm"),
        (["--processes", "0"], "--processes 0", "1 or more"),
        (["--experiment", "a b"], "experiment name 'a b'", "letters, digits"),
        (["--executor", "tpu_vm"], "no accelerator or no zone", "both"),
        (["--executor", "tpu_vm", "--accelerator", "tpu7x-8", "--zone", "z"], "accelerator 'tpu7x-8'", "v5p, v6e"),
    ],
)
def test_bad_input_is_answered_in_three_parts(config, capsys, line, found, expected):
    assert run.main(["--config", config, "--dry_run", *line]) == 2
    message = capsys.readouterr().err
    before, after = message.split(" Expected ")
    assert message.startswith("error: Found ") and found in before and expected in after
    assert ". " in after  # what to do


def test_a_variant_is_an_argument_of_the_units_config(config, tmp_path, capsys):
    """Beside the launch's own argument; validated on the config that it makes, and part of the unit's name."""
    made = create_experiment(f"{config}:runlocal", ["arm", "seed"], root=str(tmp_path / "runs"))
    assert [unit.name for unit in made.units][::2] == ["001-variant=small,seed=0", "003-variant=large,seed=0"]
    assert [unit.job.args[0] for unit in made.units[1:3]] == [
        f"--config={config}:runlocal,small",
        f"--config={config}:runlocal,large",
    ]
    assert made.units[0].job.args[2:] == ("--config.seed=0",) and made.units[0].overrides["variant"] == "small"
    assert run.main(["--config", config, "--sweep", "arm", "--root", str(tmp_path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"--config={config}:small")


def test_bad_config_files(tmp_path, capsys):
    assert run.main(["--config", str(tmp_path / "none.py"), "--list"]) == 2
    assert "no config file" in capsys.readouterr().err
    picky = "def get_config(arg=''):\n    raise ValueError(f'found config argument {arg!r}')\n"
    (tmp_path / "picky.py").write_text(picky)
    assert run.main(["--config", f"{tmp_path / 'picky.py'}:nonsense", "--list"]) == 2
    assert "(found config argument 'nonsense'). Expected one that it knows" in capsys.readouterr().err
    (tmp_path / "plain.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict\n")
    assert run.main(["--config", str(tmp_path / "plain.py"), "--list"]) == 0
    assert run.main(["--config", str(tmp_path / "plain.py"), "--sweep", "lr", "--list"]) == 2
    assert "none: it defines no sweep" in capsys.readouterr().err


def test_launching_imports_neither_jax_nor_the_package():
    code = "import sys, launch.run; print([name for name in ('jax', 'fid_imagegen', 'flax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
