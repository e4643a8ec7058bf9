"""The weighted average of runs of one architecture."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fid_imagegen.interop.public_wuerstchen import TEXT_FILE
from fid_imagegen.training.runs import TOKENIZER, read_params, whole_folder, write_params

BESIDE = (TOKENIZER, TEXT_FILE)


def average(runs: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes sum of w_i x parameters of run i, statistics as well, with the config, tokenizer and text tower of the last run.

    Raises ValueError for weights that are not positive shares of 1, and for runs of other tasks, models, tokenizers or towers.
    """
    if len(weights) != len(runs) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"found weights {list(weights)} for {len(runs)} runs, expected one positive weight a run with sum 1; change --weights"
        )
    config, trees = _same(runs)
    mean = jax.tree.map(
        lambda *leaves: sum(w * np.asarray(leaf) for w, leaf in zip(weights, leaves, strict=True)), *trees
    )
    mean = jax.tree.map(lambda average, leaf: average.astype(leaf.dtype), mean, trees[-1])
    with whole_folder(out) as folder:
        write_params(folder, config, mean)
        for name in BESIDE:
            if (runs[-1] / name).exists():
                shutil.copyfile(runs[-1] / name, folder / name)


def _same(runs: Sequence[Path]) -> tuple[Any, list[dict]]:
    """The last run's config, and the parameters of all of them; ValueError unless they fit together."""

    def shape(run, config, groups):
        found = {"task": config.task, "model": config.model.to_dict()}
        found["tensors"] = jax.tree.map(lambda leaf: leaf.shape, groups)
        return found | {name: _digest(run / name) for name in BESIDE}

    read = [read_params(run) for run in runs]
    shapes = [shape(run, *made) for run, made in zip(runs, read, strict=True)]
    for run, found in zip(runs, shapes, strict=True):
        if differing := [name for name in found if found[name] != shapes[-1][name]]:
            raise ValueError(
                f"found another {' and another '.join(differing)} in {run} than in {runs[-1]}, expected one architecture; "
                "change --runs"
            )
    return read[-1][0], [groups for _, groups in read]


def _digest(path: Path) -> str | None:
    """Of a file, None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
