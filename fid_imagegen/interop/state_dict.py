"""PyTorch state dicts <-> parameter trees: what the converters of public weights share."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

# A Linen leaf's name in PyTorch, and PyTorch's layout -> Linen's by rank of a kernel; other leaves keep their shape.
TORCH_LEAVES = {"kernel": "weight", "bias": "bias"}
# The same with a BatchNorm's, parameters and statistics.
LEAVES = TORCH_LEAVES | {"scale": "weight", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"  # PyTorch's, of BatchNorm calls; nothing reads it where the momentum is given
KERNEL_LAYOUTS = {4: "o i h w -> h w i o", 2: "o i -> i o"}


def read_state_dict(path: str | Path, what: str, remedy: str, entries: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Tensors by name of a .npz, .safetensors or PyTorch .pth/.pt/.th file (the last needs torch installed).

    `what` names the weights and `remedy` says what to do without them. entries: of a PyTorch file that holds several state
    dicts the first of these that is there is read.
    Raises FileNotFoundError, and ValueError for a damaged file or one of another kind; both name the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected {what}; {remedy}")
    if path.suffix == ".npz":
        with _undamaged(path, what), np.load(path) as archive:
            return dict(archive)
    if path.suffix == ".safetensors":
        with _undamaged(path, what):
            return safetensors.numpy.load_file(path)
    if path.suffix in (".pth", ".pt", ".th"):
        return _torch_tensors(path, what, entries)
    raise ValueError(f"found {str(path)!r}, expected {what} as .npz, .safetensors or .pth; convert the file")


def convert_state_dict(
    tensors: Mapping[str, np.ndarray], template, torch_name: Callable[[tuple[str, ...]], str], source: str
) -> dict:
    """The float32 tree shaped like `template` (arrays or ShapeDtypeStructs), each leaf read from `torch_name(path)`.

    ValueError lists every missing, extra and misshapen tensor at once; `source` says where they were looked for.
    """
    leaves, names = {}, set()
    missing, misshapen = [], []
    for path, leaf in flatten_dict(template).items():
        name = torch_name(path)
        names.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        tensor = np.asarray(tensors[name], np.float32)
        layout = KERNEL_LAYOUTS[leaf.ndim] if path[-1] == "kernel" else None
        if layout and tensor.ndim == leaf.ndim:
            tensor = rearrange(tensor, layout)
        if tensor.shape != leaf.shape:
            misshapen.append(f"{name} {tensors[name].shape} for {'/'.join(path)} {leaf.shape}")
        leaves[path] = tensor
    extra = sorted(set(tensors) - names)
    problems = {"missing": missing, "extra": extra, "misshapen": misshapen}
    if any(problems.values()):
        lines = "\n".join(f"  {kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise ValueError(
            f"found tensors that do not fit in {source}:\n{lines}\nexpected one per parameter; check the file"
        )
    return unflatten_dict(leaves)


def named_tensors(variables: Mapping, torch_name: Callable[[tuple[str, ...]], str]) -> dict[str, np.ndarray]:
    """The inverse of `convert_state_dict`: leaves in PyTorch's layout under `torch_name(path)`, and BatchNorm's counters."""
    tensors = {}
    for path, leaf in flatten_dict(variables).items():
        if path[-1] == "kernel":
            there, here = KERNEL_LAYOUTS[leaf.ndim].split(" -> ")
            leaf = rearrange(leaf, f"{here} -> {there}")
        tensors[torch_name(path)] = leaf
    means = [name for name in tensors if name.endswith(".running_mean")]
    return tensors | {name.replace("running_mean", COUNTER): np.zeros((), np.int64) for name in means}


def without_counters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(f".{COUNTER}")}


def _torch_tensors(path: Path, what: str, entries: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"found {str(path)!r} but no torch, which reading {path.suffix} needs; "
            "pip install torch, or save the state dict as .safetensors or .npz elsewhere"
        ) from error
    with _undamaged(path, what):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = next((content[entry] for entry in entries if entry in content), content)
    named = isinstance(content, Mapping)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        found = sorted(map(str, content)) if named else f"a {type(content).__name__}"
        raise ValueError(
            f"found {found} in {str(path)!r}, expected {', or '.join(['tensors by name', *entries])}: {what}; check the file"
        )
    return {name: tensor.detach().float().numpy() for name, tensor in content.items()}


@contextlib.contextmanager
def _undamaged(path: Path, what: str) -> Iterator[None]:
    """ValueError that names the file for any error while it is read: damaged zips and pickles raise one or another."""
    try:
        yield
    except Exception as error:
        reason = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0]
        raise ValueError(f"found {str(path)!r} unreadable ({reason}), expected {what}; download it again") from error
