"""Work units on this machine, one after another, each in one or more processes over loopback."""

import shlex
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from launch import records
from launch.executors.processes import interrupts, run_gang
from launch.experiment import TRAINER, Experiment, WorkUnit

PORT = 8476  # the one that is printed; a run takes a free one


def commands(unit: WorkUnit, processes: int, port: int, trainer: Sequence[str] = TRAINER) -> list[list[str]]:
    """argv of every process of the work unit. One process needs no `jax.distributed`."""
    if processes == 1:
        return [unit.job.command(trainer)]
    return [unit.job.command(trainer, f"127.0.0.1:{port}", processes, index) for index in range(processes)]


def render(experiment: Experiment, trainer: Sequence[str] = TRAINER) -> str:
    """The commands as shell text, one work unit a paragraph."""
    count = experiment.requirements.processes
    return "\n\n".join(
        "\n".join([f"# {unit.name}"] + [shlex.join(argv) for argv in commands(unit, count, PORT, trainer)])
        for unit in experiment.units
    )


def submit(experiment: Experiment, trainer: Sequence[str] = TRAINER, grace: float = 10.0) -> int:
    """Runs every work unit; a failure is reported and the next still runs. Returns 0, 1 (failure) or 130 (stopped)."""
    status = 0
    with interrupts() as stop:
        for unit in experiment.units:
            if stop.is_set():
                return 130
            status |= not _run(unit, experiment.requirements.processes, trainer, stop, grace)
        return 130 if stop.is_set() else status


def _run(unit: WorkUnit, count: int, trainer: Sequence[str], stop: threading.Event, grace: float) -> bool:
    """Runs one work unit and keeps its status. True unless it failed."""
    logs = [unit.records / f"log_{index}.txt" for index in range(count)]
    print(f"{unit.name}: running, log in {logs[0]}", flush=True)
    records.write_status(unit.records, "running")
    codes, culprit = run_gang(commands(unit, count, _free_port(), trainer), logs, stop, grace)
    if culprit is not None:
        state = "failed"
        print(f"{unit.name}: process {culprit} failed ({codes[culprit]}); {logs[culprit]} ends:", file=sys.stderr)
        print(last_lines(logs[culprit]), file=sys.stderr, flush=True)
    else:
        state = "pending" if stop.is_set() else "succeeded"  # a stopped trainer saves and exits with 0 too
    records.write_status(unit.records, state, codes)
    print(f"{unit.name}: {'interrupted; the same command resumes it' if state == 'pending' else state}", flush=True)
    return state != "failed"


def last_lines(log: Path, count: int = 20) -> str:
    """The log's end, indented."""
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-count:])


def _free_port() -> int:
    """A port that was free a moment ago; JAX's coordinator cannot be handed an open socket."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
