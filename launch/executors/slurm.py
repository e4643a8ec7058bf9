"""Work units on a SLURM cluster: one job array, one array task a work unit, one SLURM task a process.

The cluster's nodes must see this checkout, its Python and `--root` under the same paths.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from launch.errors import LaunchError
from launch.experiment import TRAINER, Experiment

# Two minutes before the time limit SLURM signals the batch script alone (B:), which stops srun, waits for the
# checkpoint and queues the task again. Not TERM: that is what scancel sends, and a cancelled job must stay cancelled.
# A preempted job is requeued by SLURM itself, which sends TERM to the processes; they save.
_BODY = """
record() {{ {python} -m launch.records "$folder" "$@"; }}
record running
srun --kill-on-bad-exit=1 --open-mode=append --output="$folder/log_%t.txt" "${{command[@]}}" &
child=$!
stopping=
trap 'stopping=1; kill -TERM "$child"' USR1
wait "$child"
code=$?
if [ -n "$stopping" ]; then
  wait "$child"
  record pending
  exec scontrol requeue "$SLURM_JOB_ID"
fi
if [ "$code" -eq 0 ]; then record succeeded 0; else record failed "$code"; fi
exit "$code"
"""


def render(experiment: Experiment, trainer: Sequence[str] = TRAINER) -> str:
    """The sbatch script."""
    needs = experiment.requirements
    options = [
        f"--job-name={experiment.name}",
        f"--array=1-{len(experiment.units)}",
        f"--nodes={needs.nodes}",
        f"--ntasks={needs.processes}",
        # Per node, not per task: JAX picks device number SLURM_LOCALID of those it sees, so a task must see them all.
        *([f"--gpus-per-node={needs.gpus_per_node}"] if needs.gpus_per_node else []),
        f"--output={shlex.quote(f'{experiment.records}/slurm-%A_%a.txt')}",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        *needs.sbatch,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", 'case "$SLURM_ARRAY_TASK_ID" in']
    for unit in experiment.units:
        command = shlex.join(unit.job.command(trainer, "auto"))
        lines += [
            f"  {unit.index})",
            f"    folder={shlex.quote(str(unit.records))}",
            f"    command=({command})",
            "    ;;",
        ]
    return "\n".join([*lines, "esac"]) + _BODY.format(python=shlex.quote(sys.executable))


def submit(experiment: Experiment, trainer: Sequence[str] = TRAINER) -> int:
    """Saves the script beside the work units and hands it to sbatch."""
    if not shutil.which("sbatch"):
        raise LaunchError(
            "no sbatch on PATH", "a SLURM login node", "Launch there, or add --dry_run to print the script"
        )
    script = experiment.records / "slurm.sh"
    script.write_text(render(experiment, trainer))
    return subprocess.run(["sbatch", str(script)]).returncode
