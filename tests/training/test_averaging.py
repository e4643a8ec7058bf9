import math
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fid_imagegen import tasks
from fid_imagegen.interop.safetensors_io import load_tree, save_tree
from fid_imagegen.training.averaging import average
from fid_imagegen.training.runs import read_params, write_params


@pytest.fixture
def other(random_stages, tmp_path):
    """Stage C again with every number doubled and 1 added."""
    folder = tmp_path / "other"
    shutil.copytree(random_stages / "stage_c", folder)
    tree = jax.tree.map(lambda leaf: 2 * leaf + 1, load_tree(folder / "model.safetensors")[0])
    save_tree(folder / "model.safetensors", tree, {})
    return folder


def test_a_weighted_average_is_a_folder_like_those_it_was_made_of(random_stages, other, tmp_path):
    first = random_stages / "stage_c"
    average([first, other], [0.25, 0.75], tmp_path / "mean")
    config, made = read_params(tmp_path / "mean")
    expected = jax.tree.map(lambda leaf: 0.25 * leaf + 0.75 * (2 * leaf + 1), read_params(first)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), made, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(made)) and config.task == "stage_c"
    assert (tmp_path / "mean" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("stage", ["stage_a", "stage_b"])
def test_statistics_are_averaged_too(random_stages, tmp_path, stage):
    """Those of a judge under spectral normalisation have names with slashes."""
    config, groups = read_params(random_stages / stage)
    if stage == "stage_a":
        _, stats = jax.jit(tasks.build(config).init)(jax.random.key(0))
        groups |= {"discriminator_stats": stats["discriminator_stats"]}
    for number in (1, 3):
        write_params(tmp_path / str(number), config, jax.tree.map(lambda leaf: np.full_like(leaf, number), groups))  # noqa: B023
    average([tmp_path / "1", tmp_path / "3"], [0.5, 0.5], tmp_path / "mean")
    made = read_params(tmp_path / "mean")[1]
    assert jax.tree.structure(made) == jax.tree.structure(groups) and any(name.endswith("_stats") for name in made)
    assert all(np.all(np.asarray(leaf) == 2) for leaf in jax.tree.leaves(made))


def test_a_tower_beside_the_weights_comes_along(random_stages, other, tmp_path):
    first = shutil.copytree(random_stages / "stage_c", tmp_path / "first")
    for folder in (first, other):
        (folder / "text.safetensors").write_bytes(b"a tower")
    average([first, other], [0.5, 0.5], tmp_path / "mean")
    assert (tmp_path / "mean" / "text.safetensors").read_bytes() == b"a tower"
    (first / "text.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="found another text.safetensors in .*first than in .*other"):
        average([first, other], [0.5, 0.5], tmp_path / "none")


def test_the_command_weighs_equally(random_stages, other, tmp_path):
    runs = f"--runs={random_stages / 'stage_c'},{other}"
    command = [sys.executable, "-m", "fid_imagegen.average", runs, f"--out={tmp_path / 'mean'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, first = (read_params(folder)[1] for folder in (tmp_path / "mean", random_stages / "stage_c"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 1.5 * b + 0.5, rtol=1e-6, atol=1e-6), made, first)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0], [0.5, math.nan], [math.nan, 0.5]])
def test_weights_that_are_no_shares(random_stages, other, tmp_path, weights):
    with pytest.raises(ValueError, match="found weights .* for 2 runs, expected one positive weight a run with sum 1"):
        average([random_stages / "stage_c", other], weights, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_runs_that_do_not_fit(random_stages, other, tmp_path):
    with pytest.raises(
        ValueError, match="found another task and another model and another tensors.*in .*stage_b than in"
    ):
        average([random_stages / "stage_b", other], [0.5, 0.5], tmp_path / "mean")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="found another tokenizer.json in .*stage_c than in .*other"):
        average([random_stages / "stage_c", other], [0.5, 0.5], tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))


def test_nothing_is_overwritten(random_stages, other, tmp_path):
    with pytest.raises(FileExistsError, match="expected a folder that does not exist"):
        average([random_stages / "stage_c", other], [0.5, 0.5], other)
