"""Which device holds which part of a parameter: an ordered list of (regex, tactic) resolved on abstract trees.

The first rule whose regex is found in an array's path ("params/generator/extractor/blocks/mlp/up/kernel") decides. Tactics:
    "replicate"            a whole copy everywhere
    "fsdp"                 the largest dimension that divides goes over `fsdp`; small arrays stay whole
    ["-", "fsdp", "tensor"]    one mesh axis a dimension, "-" for none; one that does not divide stays whole, and is logged
Optimizer and EMA trees end in the path of the parameter they mirror, so that the same rule finds them.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, str | Sequence[str]]


def path_name(path) -> str:
    """A tree path as names joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def resolve(rules: Sequence[Rule], tree: Any, mesh: Mesh, *, min_size: int) -> Any:
    """The tree of `NamedSharding` of an abstract tree. Arrays below `min_size` elements are replicated.

    Raises ValueError for an array no rule matches, a rule that matches no array, an unknown tactic, and two dimensions on one
    mesh axis.
    """
    used = set()

    def sharding(path, array):
        name = path_name(path)
        for number, (pattern, tactic) in enumerate(rules):
            if re.search(pattern, name):
                used.add(number)
                return NamedSharding(mesh, _spec(name, array.shape, tactic, mesh, min_size))
        raise ValueError(
            f"found no sharding rule for {name}, expected one to match; add ('.*', 'fsdp') to config.sharding.rules"
        )

    shardings = jax.tree_util.tree_map_with_path(sharding, tree)
    unused = [rules[number][0] for number in range(len(rules)) if number not in used]
    if unused:
        raise ValueError(
            f"found sharding rules that match nothing: {unused}; correct or remove them in config.sharding.rules"
        )
    return shardings


def _spec(name: str, shape: tuple[int, ...], tactic, mesh: Mesh, min_size: int) -> PartitionSpec:
    if tactic == "replicate":
        return PartitionSpec()
    if tactic == "fsdp":
        return _largest_dimension(name, shape, mesh.shape["fsdp"], min_size)
    if isinstance(tactic, str):
        raise ValueError(
            f"found sharding tactic {tactic!r} for {name}, expected 'replicate', 'fsdp' or a list of mesh axes"
        )
    axes = [None if axis == "-" else axis for axis in tactic]
    named = [axis for axis in axes if axis]
    if unknown := [axis for axis in named if axis not in mesh.shape]:
        raise ValueError(f"found mesh axes {unknown} in the rule for {name}, expected of {list(mesh.shape)}")
    if len(named) != len(set(named)):
        raise ValueError(
            f"found {list(tactic)} for {name}: two dimensions on one mesh axis, expected each axis at most once"
        )
    if len(axes) != len(shape):
        raise ValueError(f"found {len(axes)} axes in the rule for {name}, expected {len(shape)}: its shape is {shape}")
    if _size(shape) < min_size:
        return PartitionSpec()
    for number, (axis, length) in enumerate(zip(axes, shape, strict=True)):
        if axis and length % mesh.shape[axis]:
            logging.warning("%s %s: dimension %d does not divide over %s; it stays whole", name, shape, number, axis)
            axes[number] = None
    return PartitionSpec(*axes)


def _largest_dimension(name: str, shape: tuple[int, ...], ways: int, min_size: int) -> PartitionSpec:
    """The largest dimension that divides; never the first of a stack of layers ("blocks"), which is scanned over.

    Nor the first of other arrays of 3 and more dimensions: of a convolution's kernel it is the height.
    """
    if _size(shape) < min_size or ways == 1:
        return PartitionSpec()
    first = 1 if "/blocks/" in name or len(shape) > 2 else 0
    for number in sorted(range(first, len(shape)), key=lambda i: -shape[i]):
        if shape[number] % ways == 0:
            return PartitionSpec(*[None] * number, "fsdp")
    return PartitionSpec()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
