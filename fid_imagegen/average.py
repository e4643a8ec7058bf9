"""python -m fid_imagegen.average --runs A,B --out DIR [--weights 0.5,0.5]

The weighted average of runs of one architecture, as an exported folder: how the public Stage C was made, half the run on pictures
of mixed shapes and half its fine-tuning on artworks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fid_imagegen import command

RUNS = flags.DEFINE_list("runs", None, "work directories or exported folders, separated by commas", required=True)
WEIGHTS = flags.DEFINE_list("weights", None, "one a run; default: equal ones")
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)


def average(runs: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes sum of w_i x parameters of run i, statistics as well, with the config and tokenizer of the last run.

    Raises ValueError for weights that are not positive shares of 1, and for runs of other tasks, models or tokenizers.
    """
    import jax
    import numpy as np

    from fid_imagegen.training.runs import whole_folder, write_params

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
    import jax

    from fid_imagegen.training.runs import read_params

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


def main(argv):
    del argv
    weights = WEIGHTS.value or [1 / len(RUNS.value)] * len(RUNS.value)
    average([Path(run) for run in RUNS.value], [float(weight) for weight in weights], Path(OUT.value))
    print(f"averaged: {OUT.value}")


if __name__ == "__main__":
    command.run(main)
