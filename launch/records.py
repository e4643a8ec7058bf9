"""What a work unit leaves behind: `manifest.json` (what was launched) and `status.json` (how it went).

`python -m launch.records FOLDER STATE [EXIT_CODE]` sets the status from a batch script.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.experiment import Experiment, WorkUnit

STATES = ("pending", "running", "succeeded", "failed")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


def prepare(experiment: Experiment, executor: str) -> None:
    """Writes every manifest and a pending status. Refuses to mix two different runs in one folder."""
    for unit in experiment.units:
        _refuse_mixing(experiment, unit)
    for unit in experiment.units:
        unit.records.mkdir(parents=True, exist_ok=True)
        write_json(unit.records / "manifest.json", manifest(experiment, unit, executor))
        write_status(unit.records, "pending")


def manifest(experiment: Experiment, unit: WorkUnit, executor: str) -> dict[str, Any]:
    """All that it takes to launch the work unit again; `earlier` has the code versions of the launches it resumes."""
    previous = read_json(unit.records / "manifest.json")
    version = ("created", "git_commit", "git_diff_sha256")
    return {
        "experiment": experiment.name,
        "work_unit": unit.name,
        "config": experiment.config,
        "fixed": experiment.fixed,
        "overrides": unit.overrides,
        "argv": ["python", "-m", "fid_imagegen.train", *unit.job.args],
        "executor": executor,
        "processes": experiment.requirements.processes,
        "created": _now(),
        "git_commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "git_diff_sha256": hashlib.sha256(diff).hexdigest() if (diff := _git("diff", "HEAD")) else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "earlier": previous.get("earlier", []) + ([{key: previous[key] for key in version}] if previous else []),
    }


def write_status(records: Path, state: str, exit_codes: Sequence[int] | None = None) -> None:
    """Records a change of state. An interrupted work unit is pending again: the same command resumes it."""
    status = {"state": state, "exit_codes": exit_codes and list(exit_codes), "updated": _now()}
    if state != "pending":
        started = read_json(records / "status.json").get("started")
        status["started"] = started if state != "running" and started else status["updated"]
    write_json(records / "status.json", status)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomic: a reader, or a crash, never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, {} where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def _refuse_mixing(experiment: Experiment, unit: WorkUnit) -> None:
    """The name holds the swept keys only; the trainer would resume another config's checkpoint without a word."""
    found = read_json(unit.records / "manifest.json")
    wanted = json.loads(json.dumps([experiment.config, experiment.fixed, unit.overrides], default=str))
    if found and [found["config"], found["fixed"], found["overrides"]] != wanted:
        raise LaunchError(
            f"{unit.records} of config {found['config']} with {found['fixed'] | found['overrides']}",
            f"an empty folder, or a run of {experiment.config} with {experiment.fixed | unit.overrides} to resume",
            "Pass another --experiment or --root, or delete the folder",
        )


def _git(*args: str) -> bytes | None:
    """Output of git, None outside a repository or without git."""
    try:
        return subprocess.run(["git", *args], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    folder, new_state, *codes = sys.argv[1:]
    if new_state not in STATES:
        raise SystemExit(f"Found state {new_state!r}. Expected one of {', '.join(STATES)}. Correct the argument.")
    write_status(Path(folder), new_state, [int(code) for code in codes])
