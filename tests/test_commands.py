"""Every entry point, started as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(path.stem for path in (ROOT / "fid_imagegen").glob("*.py") if "command.run(main)" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_how_to_call_it(name):
    done = subprocess.run(
        [sys.executable, "-m", f"fid_imagegen.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    assert "python -m fid_imagegen." in done.stdout or "make demo" in done.stdout


def test_export_writes_what_the_pipeline_loads(exported, tmp_path):
    from fid_imagegen import ImageFunctionPipeline

    out = tmp_path / "shared"
    command = [sys.executable, "-m", "fid_imagegen.export", f"--workdir={exported}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert ImageFunctionPipeline.from_pretrained(out).generate(1).render(8, 8).shape == (1, 8, 8, 1)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "expected a folder that does not exist" in again.stderr + again.stdout
