"""Parameter trees <-> safetensors: the file others can open. Names are the tree's keys joined by "/", one inside a key as %2F."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

SLASH = "%2F"  # Flax names the statistics of spectral normalisation conv_0/kernel/sigma


def save_tree(path: epath.PathLike, tree: Mapping, metadata: Mapping[str, str]) -> None:
    """Writes a nested dict of arrays, bfloat16 included, whole or not at all: on any error `path` is as it was before.

    Raises ValueError for keys that could not be read back, for empty dicts, and for metadata that is not text to text.
    """
    tensors = {}
    for keys, leaf in flatten_dict(tree, keep_empty_nodes=True).items():
        if not all(isinstance(key, str) and key and SLASH not in key for key in keys) or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"found {keys} of {type(leaf).__name__}, expected arrays under non-empty text keys without {SLASH!r}; "
                "rename it or leave it out"
            )
        # safetensors reads memory as it lies: a transposed view would be saved in the wrong order.
        tensors["/".join(key.replace("/", SLASH) for key in keys)] = np.asarray(leaf, order="C")
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError(f"found metadata {dict(metadata)}, expected text to text; json.dumps the values")
    path = epath.Path(path)
    if "://" in str(path):  # an object of a bucket appears whole or not at all
        path.write_bytes(safetensors.numpy.save(tensors, dict(metadata)))
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # same folder: a rename, never a copy
    try:
        safetensors.numpy.save_file(tensors, partial, dict(metadata))
        partial.chmod(0o644)  # safetensors makes it readable by its owner alone
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tree(path: str | Path) -> tuple[dict, dict[str, str]]:
    """The (tree of numpy arrays, metadata) that `save_tree` wrote; ValueError where the file is cut short or foreign."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"found {str(path)!r} unreadable ({error}), expected a whole safetensors file; copy or convert it again"
        ) from error
    named = {tuple(key.replace(SLASH, "/") for key in name.split("/")): tensor for name, tensor in tensors.items()}
    return unflatten_dict(named), metadata or {}
