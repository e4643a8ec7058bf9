"""Work units on Cloud TPU slices: one queued resource a work unit, all at the same time, deleted when the run ends.

A slice's workers share no file system, so `--root` must be a bucket (gs://...). Cloud TPU does not queue preempted spot
capacity again: the work unit fails, and the same command resumes it from its last checkpoint. The config must be a
relative path inside the checkout, which is copied to every worker.
"""

import re
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from launch import records
from launch.errors import LaunchError
from launch.executors.local import last_lines
from launch.executors.processes import interrupts, run_gang
from launch.experiment import Experiment, WorkUnit

TRAINER = (".venv/bin/python", "-m", "fid_imagegen.train")  # in the copy of the checkout on the worker
RUNTIMES = {  # https://cloud.google.com/tpu/docs/runtimes; tpu7x is lent through GKE only
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# The runtimes' own Python is 3.10, older than the package allows.
_INSTALL = """mkdir -p fid_imagegen && tar -xzf {archive} -C fid_imagegen && cd fid_imagegen &&
curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --python 3.12 .venv &&
~/.local/bin/uv pip install --python .venv/bin/python -e '.[tpu]'""".replace("\n", " ")
# `trap` comes after `create`: a name that is taken must not delete the slice of whoever took it.
_SCRIPT = """#!/bin/bash
# {unit}
set -euo pipefail
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -czf /tmp/{archive} -T -
{create}
trap {delete} EXIT
trap 'exit 143' TERM
while state=$({describe}) && [ "$state" != ACTIVE ]; do
  case "$state" in FAILED|SUSPEND*) break ;; esac
  sleep 30
done
[ "$state" = ACTIVE ] || {{ echo "the queued resource is ${{state:-not to be found}}" >&2; exit 1; }}
{copy}
{install}
{run}
"""


def script(experiment: Experiment, unit: WorkUnit, trainer: Sequence[str] = TRAINER) -> str:
    """The work unit's life: pack this checkout (uncommitted changes too), create, wait, copy, install, run, delete."""
    needs = experiment.requirements
    name = re.sub(r"[^a-z0-9]+", "-", f"{experiment.name.lower()}-{unit.index:03d}")
    name = name if name[0].isalpha() else f"x{name}"  # resource names start with a letter
    archive, zone = f"{name}.tar.gz", f"--zone={needs.zone}"

    def gcloud(*args: str) -> str:
        return shlex.join(["gcloud", "compute", "tpus", *args, zone, "--quiet"])

    def on_every_worker(command: str) -> str:
        return gcloud("tpu-vm", "ssh", name, "--worker=all", f"--command={command}")

    capacity = [f"--accelerator-type={needs.accelerator}", f"--runtime-version={_runtime(needs.accelerator)}"]
    return _SCRIPT.format(
        unit=unit.name,
        archive=archive,
        create=gcloud("queued-resources", "create", name, f"--node-id={name}", *capacity, *["--spot"] * needs.spot),
        describe=gcloud("queued-resources", "describe", name, "--format=value(state.state)"),
        copy=gcloud("tpu-vm", "scp", f"/tmp/{archive}", f"{name}:", "--worker=all"),
        install=on_every_worker(_INSTALL.format(archive=archive)),
        run=on_every_worker(f"cd fid_imagegen && {shlex.join(unit.job.command(trainer, 'auto'))}"),
        delete=shlex.quote(gcloud("queued-resources", "delete", name, "--force")),
    )


def render(experiment: Experiment, trainer: Sequence[str] = TRAINER) -> str:
    """The scripts, one after another."""
    _check(experiment)
    local = "://" not in experiment.units[0].workdir
    note = "# Before submitting, pass --root gs://...: every worker would keep its own folder here.\n" if local else ""
    return note + "\n".join(script(experiment, unit, trainer) for unit in experiment.units)


def submit(experiment: Experiment, trainer: Sequence[str] = TRAINER, grace: float = 60.0) -> int:
    """Runs all scripts at once and waits for them. Stopping deletes the slices; what was checkpointed resumes."""
    _check(experiment)
    for unit in experiment.units:
        if "://" not in unit.workdir:
            raise LaunchError(
                f"work directory {unit.workdir}", "a bucket, which all workers see", "Pass --root gs://..."
            )
    if not shutil.which("gcloud"):
        raise LaunchError(
            "no gcloud on PATH", "the Google Cloud CLI", "Install it, or add --dry_run to print the commands"
        )
    with interrupts() as stop, ThreadPoolExecutor(len(experiment.units)) as pool:
        results = pool.map(lambda unit: _run(experiment, unit, trainer, stop, grace), experiment.units)
        failed = not all(list(results))
        return 130 if stop.is_set() else int(failed)


def _run(experiment: Experiment, unit: WorkUnit, trainer: Sequence[str], stop: threading.Event, grace: float) -> bool:
    path, log = unit.records / "tpu_vm.sh", unit.records / "log_0.txt"
    path.write_text(script(experiment, unit, trainer))
    records.write_status(unit.records, "running")
    print(f"{unit.name}: waiting for {experiment.requirements.accelerator}, log in {log}", flush=True)
    codes, culprit = run_gang([["bash", str(path)]], [log], stop, grace, whole_group=True)
    state = "failed" if culprit is not None else "pending" if stop.is_set() else "succeeded"
    records.write_status(unit.records, state, codes)
    end = f"; {log} ends:\n{last_lines(log)}" if state == "failed" else ""
    print(f"{unit.name}: {state}{end}", file=sys.stderr if end else sys.stdout, flush=True)
    return state != "failed"


def _check(experiment: Experiment) -> None:
    if not experiment.requirements.accelerator or not experiment.requirements.zone:
        raise LaunchError(
            "no accelerator or no zone",
            "both, for a Cloud TPU",
            "Add e.g. --accelerator v5p-32 --zone us-east5-a [--spot]",
        )
    _runtime(experiment.requirements.accelerator)


def _runtime(accelerator: str) -> str:
    """The VM image that Cloud TPU asks for beside the accelerator's type."""
    family = accelerator.split("-")[0]
    if family not in RUNTIMES or not re.fullmatch(r"\w+-\d+", accelerator):
        raise LaunchError(
            f"accelerator {accelerator!r}",
            f"FAMILY-SIZE with FAMILY one of {', '.join(RUNTIMES)}",
            "Correct --accelerator",
        )
    return RUNTIMES[family]
