"""Starting a group of parameters from another run: `config.init = {group: folder}`."""

from typing import Any

import jax
import numpy as np
from etils import epath

from fid_imagegen.parallel.sharding import path_name
from fid_imagegen.training.runs import read_params

PRETRAIN = "pretrain"


def fill(params: dict[str, Any], init: dict[str, str], workdir: epath.Path) -> dict[str, Any]:
    """`params` with the named groups read from work directories or exported folders.

    The folder "pretrain" is the run's own, WORKDIR/pretrain, so that a work directory may be moved and still be resumed.

    Raises ValueError listing every missing, extra and misshapen tensor at once.
    """
    for group, folder in init.items():
        if not folder:
            continue
        if group not in params:
            raise ValueError(f"found config.init.{group}, expected one of the groups {sorted(params)}")
        folder = workdir / PRETRAIN if folder == PRETRAIN else folder
        _, groups = read_params(folder)
        if group not in groups:
            raise ValueError(f"found groups {sorted(groups)} in {folder}, expected {group}; change config.init.{group}")
        params = params | {group: _matched(params[group], groups[group], folder)}
    return params


def _matched(ours: Any, theirs: Any, folder: str) -> Any:
    flat = lambda tree: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # noqa: E731
    want, have = flat(ours), flat(theirs)
    problems = [f"missing {name} {want[name].shape}" for name in sorted(set(want) - set(have))]
    problems += [f"extra {name} {have[name].shape}" for name in sorted(set(have) - set(want))]
    problems += [
        f"{name} has shape {have[name].shape}, expected {want[name].shape}"
        for name in sorted(set(want) & set(have))
        if want[name].shape != have[name].shape
    ]
    if problems:
        raise ValueError(
            f"found weights in {folder} that do not fit this model: {'; '.join(problems)}; use a config of the same model"
        )
    return jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(have[path_name(path)], x.dtype), ours)
