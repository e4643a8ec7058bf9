"""What `benchmarks/compile_wuerstchen.py` compiles for a TPU is the step that the loop runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile_wuerstchen
from configs import wuerstchen
from fid_imagegen.parallel import mesh as meshes
from fid_imagegen.training import loop

ROOT = Path(__file__).resolve().parents[1]


def small(stage, **changes):
    """A stage of the smallest config, on two devices of two kinds: rows over both axes, kernels cut."""
    config = wuerstchen.get_config("runlocal")[stage]
    config.update_from_flattened_dict({"mesh.fsdp": 2, "mesh.data": 2, "sharding.min_size": 0} | changes)
    return config


@pytest.mark.parametrize(
    ("stage", "group", "before"),
    [pytest.param("stage_b", "vqgan", "stage_a", marks=pytest.mark.slow), ("stage_c", "compressor", "stage_b")],
)
def test_the_step_without_arrays_is_the_loops(stage, group, before, random_stages, devices, tmp_path):
    devices(4)
    config = small(stage, **{f"init.{group}": str(random_stages / before)})
    run = loop.Run(config, tmp_path)
    batches = run.batches(0)
    theirs = run.step.lower(run.initial(), run.frozen, next(batches), run.key)
    batches.close()
    assert compile_wuerstchen.lower(config, run.mesh).as_text() == theirs.as_text()


def test_a_clip_tower_needs_no_weights_and_convolutions_are_the_accelerators(devices):
    devices(4)
    config = small("stage_b", **{"text.encoder": "H", "text.length": 8, "model.clip_embd": 1024})
    with compile_wuerstchen.traced_for_tpu():
        lowered = compile_wuerstchen.lower(config, meshes.make_mesh(**config.mesh))
    assert lowered.in_avals[0][1]["text"]["transformer"]["blocks"]["up"]["kernel"].shape == (24, 1024, 4096)
    assert "feature_group_count = 32" in lowered.as_text()  # depthwise: on CPU it is shifted sums


def test_the_layers_of_a_scan_are_all_counted():
    scanned, looped = (
        compile_wuerstchen.flops(small("stage_c", **{"model.depth": 4, "model.unroll": unroll}))
        for unroll in (False, True)
    )
    assert scanned == pytest.approx(looped, rel=0.01)


@pytest.mark.slow
def test_stage_c_compiles_for_a_tpu_and_fits():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "benchmarks.compile_wuerstchen", "--config", "configs/wuerstchen.py:runlocal"]
    command += ["--stage", "stage_c", "--topology", "v5e:2x2", "mesh.fsdp=2"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[0])
    assert result["fits"] and result["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert 0 < result["memory"]["arguments"] < result["memory"]["total"] < result["hbm"]
