"""The weighted average of runs of one architecture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fid_imagegen.training.runs import read_params, whole_folder, write_params


def average(runs: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes sum of w_i x parameters of run i, statistics as well, with the config and tokenizer of the last run.

    Raises ValueError for weights that are not positive shares of 1, and for runs of other tasks, models or tokenizers.
    """
    if len(weights) != len(runs) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"found weights {list(weights)} for {len(runs)} runs, expected one positive weight a run with sum 1; change --weights"
        )
    config, trees = _same(runs)
    tokenizer = runs[-1] / "tokenizer.json"
    mean = jax.tree.map(
        lambda *leaves: sum(w * np.asarray(leaf) for w, leaf in zip(weights, leaves, strict=True)), *trees
    )
    mean = jax.tree.map(lambda average, leaf: average.astype(leaf.dtype), mean, trees[-1])
    with whole_folder(out) as folder:
        write_params(folder, config, mean)
        if tokenizer.exists():
            (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())


def _same(runs: Sequence[Path]) -> tuple[Any, list[dict]]:
    """The last run's config, and the parameters of all of them; ValueError unless they fit together."""

    def shape(run, config, groups):
        tokenizer = run / "tokenizer.json"
        return {
            "task": config.task,
            "model": config.model.to_dict(),
            "tensors": jax.tree.map(lambda leaf: leaf.shape, groups),
            "tokenizer": tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else "",
        }

    read = [read_params(run) for run in runs]
    shapes = [shape(run, *made) for run, made in zip(runs, read, strict=True)]
    for run, found in zip(runs, shapes, strict=True):
        if differing := [name for name in found if found[name] != shapes[-1][name]]:
            raise ValueError(
                f"found another {' and another '.join(differing)} in {run} than in {runs[-1]}, expected one architecture; "
                "change --runs"
            )
    return read[-1][0], [groups for _, groups in read]
