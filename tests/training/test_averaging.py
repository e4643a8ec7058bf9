import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fid_imagegen.interop.safetensors_io import load_tree, save_tree
from fid_imagegen.training.averaging import average
from fid_imagegen.training.runs import read_params


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


def test_the_command_weighs_equally(random_stages, other, tmp_path):
    runs = f"--runs={random_stages / 'stage_c'},{other}"
    command = [sys.executable, "-m", "fid_imagegen.average", runs, f"--out={tmp_path / 'mean'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, first = (read_params(folder)[1] for folder in (tmp_path / "mean", random_stages / "stage_c"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 1.5 * b + 0.5, rtol=1e-6, atol=1e-6), made, first)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5]])
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
    with pytest.raises(ValueError, match="found another tokenizer in .*stage_c than in .*other"):
        average([random_stages / "stage_c", other], [0.5, 0.5], tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))


def test_nothing_is_overwritten(random_stages, other, tmp_path):
    with pytest.raises(FileExistsError, match="expected a folder that does not exist"):
        average([random_stages / "stage_c", other], [0.5, 0.5], other)
