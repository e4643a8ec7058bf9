"""What is launched: an experiment, its work units, and the job each of them runs."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import config_file, sweep
from launch.errors import LaunchError

# On this machine and on clusters that share its file system; tests put a fake trainer in its place.
TRAINER = (sys.executable, "-m", "fid_imagegen.train")
VARIANT = "variant"
MAX_NAME = 80  # characters of a work unit's name; file systems allow 255, terminals and people less


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What one work unit needs. Each executor reads its own fields and refuses when one is missing."""

    processes: int = 1
    nodes: int = 1
    gpus_per_node: int = 0
    sbatch: tuple[str, ...] = ()  # further sbatch options, such as --partition=gpu
    accelerator: str = ""  # Cloud TPU type, such as v5p-32
    zone: str = ""
    spot: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """The trainer's arguments, without the program: where Python is differs by machine."""

    args: tuple[str, ...]

    def command(
        self, trainer: Sequence[str], distributed: str = "off", processes: int = 1, index: int = 0
    ) -> list[str]:
        """One process's argv. `distributed` is off, auto (the scheduler tells) or HOST:PORT of process 0."""
        argv = [*trainer, *self.args, f"--distributed={distributed}"]
        if distributed not in ("off", "auto"):
            argv += [f"--num_processes={processes}", f"--process_id={index}"]
        return argv


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """One point of the sweep. `workdir` may be in a bucket; `records`, where the launcher writes, is a local folder."""

    index: int  # from 1, as in XManager; also the SLURM array task
    name: str
    overrides: dict[str, Any]
    workdir: str
    records: Path
    job: Job


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One config file, launched at every point of a sweep."""

    name: str
    config: str  # FILE.py[:argument]
    fixed: dict[str, Any]  # overrides that every work unit shares
    records: Path
    units: tuple[WorkUnit, ...]
    requirements: Requirements


def create_experiment(
    config: str,
    sweeps: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
    name: str = "",
    root: str = "runs",
    requirements: Requirements = Requirements(),
) -> Experiment:
    """Plans the product of the named sweeps of `config`; every override is checked, nothing is written.

    The key "variant" of a point is no override: it names a variant of the config file's `get_config` for that work unit.
    """
    fixed = dict(fixed or {})
    name = name or Path(config.split(":", 1)[0]).stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise LaunchError(f"experiment name {name!r}", "letters, digits, '.', '_' and '-'", "Pass another --experiment")
    known, named = config_file.load(config)
    points = sweep.select(list(sweeps), named, config.split(":", 1)[0])
    remote = "://" in root
    records = Path("runs" if remote else root) / name
    units = []
    for index, overrides in enumerate(points, start=1):
        if both := sorted(fixed.keys() & overrides.keys()):
            raise LaunchError(
                f"{', '.join(both)} both swept and on the command line", "one source of a value", "Drop one of them"
            )
        keys = fixed | {key: value for key, value in overrides.items() if key != VARIANT}
        own = config_file.with_variant(config, overrides[VARIANT]) if VARIANT in overrides else config
        config_file.validate(own, known if own == config else config_file.load(own)[0], keys)
        unit = unit_name(index, overrides)
        workdir = f"{root.rstrip('/')}/{name}/{unit}" if remote else str(records / unit)
        args = (f"--config={own}", f"--workdir={workdir}", *config_file.as_flags(keys))
        units.append(WorkUnit(index, unit, overrides, workdir, records / unit, Job(args)))
    return Experiment(name, config, fixed, records, tuple(units), requirements)


def unit_name(index: int, overrides: Mapping[str, Any]) -> str:
    """`001-learning_rate=0.001,seed=0`: last parts of the keys, safe in a path; cut with a hash where too long."""
    short = [key.rsplit(".", 1)[-1] for key in overrides]
    keys = overrides if len(set(short)) < len(short) else short
    text = ",".join(f"{key}={value}" for key, value in zip(keys, overrides.values(), strict=True))
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", f"{index:03d}-{text}" if text else f"{index:03d}")
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(json.dumps(dict(overrides), sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}-{digest}"
