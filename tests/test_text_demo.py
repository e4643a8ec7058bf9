"""The demo of text to image, and of its baselines."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["", "ldm,", "text_only,", "jumps,", "b_jumps,"])
def test_every_model_of_the_shapes_config_is_judged(baseline, tmp_path):
    command = [sys.executable, "-m", "fid_imagegen.text_demo", "--workdir", str(tmp_path)]
    command += ["--config", f"configs/shapes_wuerstchen.py:{baseline}runlocal"]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == 200 and set(report["alignment"]) == set(report["true_renders"])
    assert report["true_renders"]["shape"] >= 0.99
    assert sum(report["sampling_seconds"].values()) <= report["seconds"]
    assert ("latents" in report) == (baseline in ("", "jumps,", "b_jumps,"))
    assert (tmp_path / "prompts.png").exists() and (tmp_path / "training_curves.png").exists()
