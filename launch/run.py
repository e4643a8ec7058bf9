"""Launches a config file at every point of a sweep, and tabulates what came of it.

    python -m launch.run --config configs/digits_cm_func.py --sweep lr,seed --list
    python -m launch.run --config configs/digits_cm_func.py --sweep lr,seed --executor local --processes 2
    python -m launch.run --config configs/digits_cm_func.py --executor slurm --nodes 2 --processes 16 --dry_run
    python -m launch.run --config F.py --executor tpu_vm --accelerator v5p-32 --zone us-east5-a --root gs://B --dry_run
    python -m launch.run table --experiment digits_cm_func --metrics loss

Further `--config.a.b=value` are overrides of every work unit.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import executors, records, table
from launch.errors import LaunchError
from launch.experiment import Experiment, Requirements, create_experiment


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, 1 (a work unit failed), 2 (bad input) or 130 (interrupted)."""
    try:
        return _table(argv[1:]) if argv[:1] == ["table"] else _launch(argv)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m launch.run", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--sweep", default="", metavar="NAME,...", help="names of get_sweep(); their product is run")
    parser.add_argument("--executor", default="local", help=", ".join(executors.EXECUTORS))
    parser.add_argument("--root", default="runs", help="work directories are ROOT/EXPERIMENT/WORK_UNIT")
    parser.add_argument("--experiment", default="", help="default: the config file's name")
    parser.add_argument("--list", action="store_true", help="print the work units and stop")
    parser.add_argument("--dry_run", action="store_true", help="print the exact commands and stop")
    parser.add_argument("--processes", type=int, default=1, help="of one work unit (local, slurm)")
    parser.add_argument("--nodes", type=int, default=1, help="of one work unit (slurm)")
    parser.add_argument("--gpus_per_node", type=int, default=0, help="(slurm)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--partition=gpu", help="sbatch option (slurm)"
    )
    parser.add_argument("--accelerator", default="", metavar="v5p-32", help="(tpu_vm)")
    parser.add_argument("--zone", default="", help="(tpu_vm)")
    parser.add_argument("--spot", action="store_true", help="capacity that can be taken back, cheaper (tpu_vm)")
    args, rest = parser.parse_known_args(argv)

    executor = executors.get(args.executor)
    for flag in ("processes", "nodes"):
        if getattr(args, flag) < 1:
            raise LaunchError(f"--{flag} {getattr(args, flag)}", "1 or more", "Correct it")
    needs = Requirements(
        args.processes, args.nodes, args.gpus_per_node, tuple(args.sbatch), args.accelerator, args.zone, args.spot
    )
    names = [name for name in args.sweep.split(",") if name]
    experiment = create_experiment(args.config, names, _overrides(rest), args.experiment, args.root, needs)
    if args.list:
        _list(experiment)
        return 0
    if args.dry_run:
        print(executor.render(experiment))
        return 0
    records.prepare(experiment, args.executor)
    return executor.submit(experiment)


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--config.a.b=value` arguments as overrides; anything else is refused."""
    overrides: dict[str, str] = {}
    for argument in rest:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, re.DOTALL)
        if not match:
            raise LaunchError(f"argument {argument!r}", "a flag of --help, or --config.KEY=VALUE", "Correct it")
        if match[1] in overrides:
            raise LaunchError(f"--config.{match[1]} twice", "one value of a key", "Drop one of them")
        overrides[match[1]] = match[2]
    return overrides


def _list(experiment: Experiment) -> None:
    for unit in experiment.units:
        shown = [
            arg for arg in unit.job.args if arg not in (f"--config={experiment.config}", f"--workdir={unit.workdir}")
        ]
        print(f"{unit.workdir}  {' '.join(shown)}".rstrip())


def _table(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m launch.run table", allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--metrics", type=lambda text: text.split(","), metavar="NAME,...", help="default: all")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    result = table.rows(args.root, args.experiment, args.metrics)
    print(table.as_text(result))
    if args.csv:
        table.write_csv(result, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
