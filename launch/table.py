"""An experiment's results: one row a work unit, its overrides joined with its status and final metrics."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.records import read_json

Row = dict[str, Any]


def rows(root: Path, experiment: str, metrics: Sequence[str] | None = None) -> list[Row]:
    """Reads every work unit of the experiment. All rows have the same keys in the same order; missing values are ""."""
    manifests = sorted((root / experiment).glob("*/manifest.json"))
    if not manifests:
        known = sorted({path.parent.parent.name for path in root.glob("*/*/manifest.json")})
        raise LaunchError(
            f"no experiment {experiment!r} in {root}",
            f"one of those there ({', '.join(known) or 'none'})",
            "Correct it",
        )
    units = [(read_json(path), read_json(path.parent / "status.json"), final(path.parent)) for path in manifests]
    overridden = list(dict.fromkeys(key for manifest, _, _ in units for key in manifest["overrides"]))
    measured = sorted({key for _, _, last in units for key in last} - {"step"})
    for name in metrics or ():
        if name not in measured:
            raise LaunchError(f"metric {name!r}", f"one of {', '.join(measured) or 'none yet'}", "Correct --metrics")
    return [
        {"work_unit": manifest["work_unit"]}
        | {key: manifest["overrides"].get(key, "") for key in overridden}
        | {"status": status.get("state", "")}
        | {key: last.get(key, "") for key in ("step", *(measured if metrics is None else metrics))}
        for manifest, status, last in units
    ]


def final(workdir: Path) -> Row:
    """The last value of every scalar in `metrics.jsonl`; metrics may be written at different steps."""
    path, last = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed run, or one that is writing now, left unfinished
            continue
        last |= {key: value for key, value in values.items() if type(value) in (int, float)}
    return last


def as_text(table: Sequence[Row]) -> str:
    """Aligned columns."""
    cells = [list(table[0])] + [[_show(value) for value in row.values()] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write_csv(table: Sequence[Row], path: Path) -> None:
    """The same table with every digit."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
