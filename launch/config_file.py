"""Config files as the launcher sees them: the sweeps they define, the keys they have, and overrides as flags."""

import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from launch.errors import LaunchError
from launch.sweep import Sweep


def load(config: str) -> tuple[dict[str, Any], dict[str, Sweep]]:
    """Reads `FILE.py[:argument]`. Returns its values by dotted key, and its named sweeps."""
    path, *argument = config.split(":", 1)
    if not Path(path).is_file():
        raise LaunchError(f"no config file {path!r}", "a Python file with get_config()", "Correct --config")
    spec = importlib.util.spec_from_file_location(f"launched_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise LaunchError(f"no get_config in {path}", "a function that returns a ConfigDict", "Define it")
    try:
        values = dict(flatten(module.get_config(*argument)))
    except ValueError as error:
        raise LaunchError(
            f"config {config!r} that {path} refuses ({error})", "one that it knows", "Correct it"
        ) from error
    return values, getattr(module, "get_sweep", dict)()


def with_variant(config: str, variant: str) -> str:
    """`FILE.py[:argument]` with one more variant in its argument."""
    path, *argument = config.split(":", 1)
    return f"{path}:{','.join([*filter(None, argument), variant])}"


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_flags(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the trainer's flags. Not quoted: quoting is for whoever writes the list as text."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def validate(config: str, known: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuses overrides that the trainer would refuse, before anything waits in a queue for it.

    The flags go through the parser that the trainer uses, and typed values must come out as they went in: None, say,
    has no form as a flag.
    """
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or list(known)
            raise LaunchError(
                f"override of {key!r}, a key that {config} lacks", f"a key such as {', '.join(near)}", "Correct the key"
            )
    argv = ["launch", f"--config={config}", *as_flags(overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise LaunchError(
            f"overrides {dict(overrides)} that do not parse ({error})",
            f"values of the types in {config}",
            "Correct them",
        ) from error
    parsed = dict(flatten(values.config))
    for key, value in overrides.items():
        if not isinstance(value, str) and parsed[key] != value:
            raise LaunchError(
                f"{key}={value!r}, which arrives in the trainer as {parsed[key]!r}",
                f"a value of the type of {known[key]!r} that a flag can carry (number, bool, string or tuple)",
                f"Write it as one of those in get_sweep() of {config}",
            )
