"""Sweeps: a sweep is a list of override dicts `{"optimizer.learning_rate": 1e-3}`, and these combine them."""

import itertools
from collections.abc import Mapping
from typing import Any

from launch.errors import LaunchError

Overrides = dict[str, Any]
Sweep = list[Overrides]


def fixed(overrides: Mapping[str, Any]) -> Sweep:
    """One point: the same overrides for everything it is combined with."""
    return [dict(overrides)]


def chain(*sweeps: Sweep) -> Sweep:
    """All points of the first sweep, then all of the second, ..."""
    return list(itertools.chain.from_iterable(sweeps))


def product(*sweeps: Sweep) -> Sweep:
    """Every combination, the last sweep varying fastest. `product()` is one point without overrides."""
    return [_merge(points) for points in itertools.product(*sweeps)]


def zip_(*sweeps: Sweep) -> Sweep:
    """The i-th point of each sweep together."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise LaunchError(
            f"sweeps of lengths {lengths} to zip", "equal lengths", "Add or remove points, or use `product` instead"
        )
    return [_merge(points) for points in zip(*sweeps, strict=True)]


def select(names: list[str], known: Mapping[str, Sweep], where: str) -> Sweep:
    """The product of the named sweeps, in the order of `names`. `where` says in errors which file they come from."""
    for name in names:
        if name not in known:
            choices = ", ".join(known) or "none: it defines no sweep"
            raise LaunchError(
                f"sweep {name!r}", f"one of those in {where} ({choices})", "Correct --sweep, or add it to get_sweep()"
            )
        if not known[name]:
            raise LaunchError(f"sweep {name!r} without points", "at least one", f"Add override dicts to it in {where}")
    return product(*(known[name] for name in names))


def _merge(points: tuple[Overrides, ...]) -> Overrides:
    """The union of the dicts. Two values of a key are refused: which wins would depend on the sweeps' order."""
    merged: Overrides = {}
    for key, value in itertools.chain.from_iterable(point.items() for point in points):
        if key in merged and merged[key] != value:
            raise LaunchError(
                f"two values of {key!r} in one work unit: {merged[key]!r} and {value!r}",
                "sweeps that override different keys",
                "Drop one of the sweeps, or join them with `chain`",
            )
        merged[key] = value
    return merged
