"""A checksum of a tree of arrays that does not depend on how they lie on devices.

Storage flips bits, and the checkpoint format notices none of them (30 of 30 in a trial). The sum is of integers, exact in any
order: one device, a mesh and NumPy agree. Every weight is odd, so that any single flipped bit changes it.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.parallel.sharding import path_name

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def checksum(tree: Any, xp=jnp) -> jax.Array | np.ndarray:
    """uint32 [] of all leaves and their paths: sum of bits (2 position + 1) per leaf, each leaf times an odd hash of its path.

    `xp` is jax.numpy (jit it) or numpy. Leaves have 1, 2 or 4 bytes an element.
    """
    total = xp.zeros((), np.uint32)
    with np.errstate(over="ignore"):  # all is meant modulo 2^32
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            odd = np.uint32(zlib.crc32(path_name(path).encode()) | 1)
            total = total + odd * _leaf_sum(leaf, xp)
    return total


def _leaf_sum(leaf: Any, xp) -> Any:
    bits = leaf.view(UNSIGNED[leaf.dtype.itemsize]).astype(np.uint32)
    strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
    # An open grid of indices, not one arange: nothing of the array's size that has no sharding is made.
    grid = xp.indices(leaf.shape, dtype=np.uint32, sparse=True)
    position = sum(
        (index * np.uint32(stride % 2**32) for index, stride in zip(grid, strides, strict=True)), np.uint32(0)
    )
    return xp.sum(bits * (2 * position + np.uint32(1)), dtype=np.uint32)
