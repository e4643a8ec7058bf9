"""Weighted averages of parameters: over runs of one architecture, and over the snapshots of one run."""

import functools
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fid_imagegen.interop.public_wuerstchen import TEXT_FILE
from fid_imagegen.interop.safetensors_io import load_tree, save_tree
from fid_imagegen.parallel import mesh as meshes
from fid_imagegen.training import ema
from fid_imagegen.training.runs import TOKENIZER, read_config, read_params, whole_folder, write_params

SNAPSHOTS = "snapshots"
BESIDE = (TOKENIZER, TEXT_FILE)


def average(runs: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes sum of w_i x parameters of run i, statistics as well, with the config, tokenizer and text tower of the last run.

    Raises ValueError for weights that are not positive shares of 1, and for runs of other tasks, models, tokenizers or towers.
    """
    # Every comparison with a weight that is no number is false.
    if len(weights) != len(runs) or not (min(weights, default=0) > 0 and abs(sum(weights) - 1) <= 1e-6):
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
        _copy_beside(runs[-1], folder)


def save_snapshot(run, step: int, state) -> None:
    """Writes a run's power averages of this step, whole or not at all."""
    parts = {name: state.ema[name] for name in map(ema.width_name, run.config.ema_widths)}
    parts |= {"model_state": state.model_state} if state.model_state else {}
    where = meshes.replicated(run.mesh)
    # One part after another on the devices: all of a large model's averages at once may not fit there whole.
    kept = {name: jax.tree.map(np.asarray, _gathered(tree, where)) for name, tree in parts.items()}
    if jax.process_index() == 0:
        folder = run.workdir / SNAPSHOTS
        folder.mkdir(parents=True, exist_ok=True)
        save_tree(folder / f"{step:09d}.safetensors", kept, {"format": "fid_imagegen.snapshot.1"})


def average_of_width(run: Path, width: float, out: Path) -> None:
    """Writes the power average of `width` at the run's last snapshot, found from all its snapshots; statistics are the last's.

    Raises FileNotFoundError where there are none, ValueError for a width that cannot be.
    """
    files = sorted((run / SNAPSHOTS).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"found no snapshots in {run}, expected some; train with config.ema_widths=(0.05, 0.1) and config.ema_snapshots=1000"
        )
    config = read_config(run)
    snapshots = [(int(file.stem), each) for file in files for each in config.ema_widths]
    weights = ema.combination(snapshots, (int(files[-1].stem), width)).reshape(len(files), -1)
    total = None
    for file, own in zip(files, weights, strict=True):  # one snapshot in memory at a time
        tree, _ = load_tree(file)
        for each, weight in zip(config.ema_widths, own, strict=True):
            part = jax.tree.map(lambda leaf, w=weight: w * leaf.astype(np.float64), tree[ema.width_name(each)])
            total = part if total is None else jax.tree.map(np.add, total, part)
    groups = jax.tree.map(lambda leaf: leaf.astype(np.float32), total) | tree.get("model_state", {})
    with whole_folder(out) as folder:
        write_params(folder, config, groups)
        _copy_beside(run, folder)


@functools.partial(jax.jit, static_argnums=1)
def _gathered(tree, where):
    return jax.lax.with_sharding_constraint(tree, where)


def _copy_beside(run: Path, folder: Path) -> None:
    for name in BESIDE:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)


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
