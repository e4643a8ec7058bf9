"""A group that an objective owns: sct's learned weight of levels in a whole run."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import resume_campaign
from configs import common
from fid_imagegen import ImageFunctionPipeline
from fid_imagegen.training import runs
from fid_imagegen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def weighted(devices, tiny):
    """The config of six steps of sct with the weight."""
    devices(1)
    changes = {"distance": "l2", "time": "angle", "model.level_scale": 1.0, "checkpoint.every": 3}
    config = tiny("sct", **changes).copy_and_resolve_references().unlock()
    common.learn_level_weight(config)
    return config.lock()


def test_a_weight_is_trained_saved_and_resumed(weighted, tmp_path, stop_at):
    assert train(weighted, tmp_path / "whole")
    stop_at(4)
    assert not train(weighted, tmp_path / "run")
    stop_at(None)
    assert train(weighted, tmp_path / "run")
    whole, resumed = (resume_campaign.last_state(tmp_path / name) for name in ("whole", "run"))
    kept = [name for name in whole if "['level_weight']" in name]
    assert {name.partition("]")[0] for name in kept} == {"['params'", "['ema'", "['opt_state'"}
    assert whole == resumed
    _, groups = runs.read_params(tmp_path / "run")
    cosines = np.asarray(groups["level_weight"]["cosines"])
    assert cosines.shape == (16,) and 0 < cosines[0] < 0.061  # upwards, for the loss is below 1; Adam's steps of 0.01
    # What is shared is the generator, and it makes the same functions.
    command = [
        sys.executable,
        "-m",
        "fid_imagegen.export",
        f"--workdir={tmp_path / 'run'}",
        f"--out={tmp_path / 'out'}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert set(runs.read_params(tmp_path / "out")[1]) == {"generator"}
    made = [ImageFunctionPipeline.from_pretrained(tmp_path / name).generate(2).functions for name in ("run", "out")]
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_the_weight_needs_its_optimizer(weighted, tmp_path):
    with weighted.unlocked():
        del weighted.optimizers.level_weight
    with pytest.raises(
        ValueError, match=r"found optimizers for \['generator'\], expected \['generator', 'level_weight'\]"
    ):
        train(weighted, tmp_path)
