"""Executors: where work units run. Adding one is one file with the two functions below, and one line here.

`render(experiment) -> str` is pure: the exact commands, as `--dry_run` prints them.
`submit(experiment) -> int` runs them and returns the launcher's exit status.
"""

from types import ModuleType

from launch.errors import LaunchError
from launch.executors import local, slurm, tpu_vm

EXECUTORS: dict[str, ModuleType] = {"local": local, "slurm": slurm, "tpu_vm": tpu_vm}


def get(name: str) -> ModuleType:
    """The executor of that name."""
    if name not in EXECUTORS:
        raise LaunchError(f"executor {name!r}", f"one of {', '.join(EXECUTORS)}", "Correct --executor")
    return EXECUTORS[name]
