"""Starting a group of parameters from another run: `config.init = {group: folder}`."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from fid_imagegen.parallel.sharding import path_name
from fid_imagegen.training.runs import read_params

PRETRAIN = "./pretrain"
STATISTICS = "_stats"


def fill(
    groups: dict[str, Any], init: dict[str, str], workdir: epath.Path, borrowed: dict | None = None
) -> dict[str, Any]:
    """`groups` with those that `init` names read from work directories or exported folders.

    A folder that begins with "./" or "../" lies in or beside the work directory, so that all of them may be moved together.
    Statistics (NAME_stats) come with the group NAME. Leaves may be abstract.

    borrowed: {name: (its name in the other run, check(that run's config, folder))} of groups that are called otherwise there.
    Raises ValueError listing every missing, extra and misshapen tensor at once.
    """
    read = functools.cache(lambda folder: read_params(inside(folder, workdir)))
    filled, borrowed = {}, borrowed or {}
    for name, tree in groups.items():
        if not (folder := init.get(name.removesuffix(STATISTICS), "")):
            filled[name] = tree
            continue
        config, theirs = read(folder)
        there, check = borrowed.get(name, (name, lambda config, folder: None))
        check(config, folder)
        filled[name] = _matched(tree, _named(theirs, there, folder), folder)
    return filled


def overlay(groups: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """`groups` with the leaves of `parts`, trees that hold some of theirs, in their places."""
    return unflatten_dict(flatten_dict(groups) | flatten_dict(parts))


def whole(frozen: dict[str, Any]) -> dict[str, Any]:
    """Frozen groups as they are, if every one has its weights; ValueError for one that is still abstract."""
    for name, tree in frozen.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"found no weights for the frozen group {name!r}, expected a run or exported folder that holds it; "
                f"set config.init.{name.removesuffix(STATISTICS)}"
            )
    return frozen


def check_names(init: dict[str, str], groups: dict[str, Any]) -> None:
    """ValueError for a group in `config.init` that the task has not."""
    for group, folder in init.items():
        if folder and group not in groups:
            raise ValueError(f"found config.init.{group}, expected one of the groups {sorted(groups)}")


def inside(folder: str, workdir: epath.Path) -> epath.Path:
    """The folder as a path; "./" and "../" are resolved here because object stores know no parents."""
    if folder.startswith("../"):
        whole = workdir if "://" in str(workdir) else workdir.resolve()  # "." has no parent
        return whole.parent / folder.removeprefix("../")
    return workdir / folder.removeprefix("./") if folder.startswith("./") else epath.Path(folder)


def _named(groups: dict[str, Any], name: str, folder: str) -> Any:
    if name not in groups:
        raise ValueError(
            f"found groups {sorted(groups)} in {folder}, expected {name}; change config.init.{name.removesuffix(STATISTICS)}"
        )
    return groups[name]


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
