"""Stage B and Stage C of Würstchen: our params <-> state dicts under diffusers' names or the authors' (dome272/Wuerstchen).

A model's names are a table made from its configuration alone; reading and writing both go through it.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from fid_imagegen.interop.state_dict import TORCH_LEAVES, read_state_dict
from fid_imagegen.models.wuerstchen.stage_b import StageB
from fid_imagegen.models.wuerstchen.stage_c import StageC

# PyTorch's axes and ours, by kind of layer; what is not named here is linear.
LAYOUTS = {
    "linear": ("o i", "i o"),
    "pointwise": ("o i 1 1", "i o"),
    "conv": ("o i h w", "h w i o"),
    "transposed": ("i o h w", "h w i o"),
    "vector": ("c", "c"),
    "response_norm": ("1 1 1 c", "c"),
}
# Layers of a Block: which of its modules C, T, A holds them, and PyTorch's name there.
BLOCK = {
    "residual/depthwise": (0, "depthwise", "conv"),
    "residual/up": (0, "channelwise.0", "linear"),
    "residual/response_norm": (0, "channelwise.2", "response_norm"),
    "residual/down": (0, "channelwise.4", "linear"),
    "timestep/mapper": (1, "mapper", "linear"),
    "attention/query": (2, "attention.to_q", "linear"),
    "attention/key": (2, "attention.to_k", "linear"),
    "attention/value": (2, "attention.to_v", "linear"),
    "attention/out": (2, "attention.to_out.0", "linear"),
    "attention/text_mapper": (2, "kv_mapper.1", "linear"),
}
STAGE_C = {
    "projection": ("projection", "pointwise"),
    "cond_in": ("cond_mapper.0", "linear"),
    "cond_out": ("cond_mapper.2", "linear"),
    "out": ("out.1", "pointwise"),
}
STAGE_B = {
    "clip_mapper": ("clip_mapper", "linear"),
    "embedding": ("embedding.1", "pointwise"),
    "clf": ("clf.1", "pointwise"),
}
# Names that only the other versions of the model have.
FOREIGN = {
    "clip_txt_mapper.": "Stable Cascade (v3)",
    "clip_txt_pooled_mapper.": "Stable Cascade (v3)",
    "pixels_mapper.": "Stable Cascade (v3)",
    "byt5_mapper.": "the discrete Stage B of Würstchen v1",
}
FUSED = {"in_proj_": ("to_q.", "to_k.", "to_v."), "out_proj.": ("to_out.0.",)}  # the authors' attention and diffusers'
ENTRIES = ("ema_state_dict", "state_dict")  # where the authors' files hold the weights; Stage C samples with its EMA
REMEDY = "download it and give its path"

LeafPath = tuple[str, ...]


class Entry(NamedTuple):
    """One of our leaves in PyTorch: its tensors' names in the stack's order (one if not stacked), their shape, axes of both."""

    names: tuple[str, ...]
    torch_shape: tuple[int, ...]
    torch_axes: str
    axes: str
    stacked: bool


def abstract_params(model: StageB | StageC):
    """Shapes and types of the model's params; no memory is taken."""
    latent = 1 if isinstance(model, StageC) else model.patch_size * 2 ** (len(model.c_hidden) - 1)
    args = [jnp.zeros((1, latent, latent, model.c_in)), jnp.zeros(1)]
    if isinstance(model, StageB):
        args += [jnp.zeros((1, 1, 1, model.effnet_embd)) if any(model.inject_effnet) else None]
        args += [jnp.zeros((1, 1, model.clip_embd)) if model.text else None]
    else:
        args += [jnp.zeros((1, 1, model.c_cond))]
    return jax.eval_shape(lambda key: model.init(key, *args, method="end_to_end"), jax.random.key(0))["params"]


@functools.cache
def name_table(model: StageB | StageC) -> dict[LeafPath, Entry]:
    """Every leaf of the model's params by path."""
    modules = _stage_c_modules if isinstance(model, StageC) else _stage_b_modules
    table = {}
    for path, leaf in flatten_dict(abstract_params(model)).items():
        names, kind = modules(model, path[:-1])
        names = tuple(f"{name}.{TORCH_LEAVES.get(path[-1], path[-1])}" for name in names)
        torch_axes, axes = LAYOUTS[kind if path[-1] == "kernel" or kind == "response_norm" else "vector"]
        stacked = "blocks" in path
        sizes = dict(zip(axes.split(), leaf.shape[stacked:], strict=True)) | {"1": 1}
        torch_shape = tuple(sizes[axis] for axis in torch_axes.split())
        table[path] = Entry(names, torch_shape, torch_axes, axes, stacked)
    return table


def torch_shapes(model: StageB | StageC) -> dict[str, tuple[int, ...]]:
    """The model's tensors in PyTorch: shapes by diffusers' names."""
    return {name: entry.torch_shape for entry in name_table(model).values() for name in entry.names}


def from_state_dict(model: StageB | StageC, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """The model's params in float32, from tensors under diffusers' names or the authors'.

    Raises ValueError naming the version where it is another one, and listing every missing, extra and misshapen tensor at once;
    `source` says where they were looked for.
    """
    for name in tensors:
        if version := next((version for mark, version in FOREIGN.items() if name.startswith(mark)), None):
            raise ValueError(
                f"found {name!r} in {source}: weights of {version}, expected Würstchen v2; "
                "give the files of warp-ai/wuerstchen or warp-ai/wuerstchen-prior"
            )
    tensors = split_projections(tensors)
    shapes = torch_shapes(model)
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "extra": sorted(set(tensors) - set(shapes)),
        "misshapen": [
            f"{name} {tensors[name].shape} for {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        lines = "\n".join(f"  {kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise ValueError(
            f"found tensors that do not fit in {source}:\n{lines}\nexpected those of {type(model).__name__} at this "
            "configuration; check the file and the configuration beside it"
        )

    def leaf(entry: Entry) -> np.ndarray:
        layers = [rearrange(tensors[name], f"{entry.torch_axes} -> {entry.axes}") for name in entry.names]
        return np.asarray(np.stack(layers) if entry.stacked else layers[0], np.float32)

    return unflatten_dict({path: leaf(entry) for path, entry in name_table(model).items()})


def to_state_dict(model: StageB | StageC, params) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under diffusers' names, which `load_state_dict` there takes strictly."""
    leaves, tensors = flatten_dict(params), {}
    for path, entry in name_table(model).items():
        layers = leaves[path] if entry.stacked else [leaves[path]]
        for name, layer in zip(entry.names, layers, strict=True):
            tensors[name] = rearrange(layer, f"{entry.axes} -> {entry.torch_axes}")
    return tensors


def split_projections(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' names -> diffusers': query, key and value, one matrix there, are three. Diffusers' pass unchanged."""
    out = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*attention\.)attn\.(in_proj_|out_proj\.)(weight|bias)", name):
            prefix, layer, leaf = match.groups()
            parts = [prefix + part + leaf for part in FUSED[layer]]
            out |= zip(parts, np.split(np.asarray(tensor), len(parts)), strict=True)
        else:
            out[name] = tensor
    return out


def join_projections(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Diffusers' names -> the authors'."""
    layers, out = {part: layer for layer, parts in FUSED.items() for part in parts}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*attention\.)(to_q\.|to_k\.|to_v\.|to_out\.0\.)(weight|bias)", name):
            prefix, part, leaf = match.groups()
            parts = FUSED[layers[part]]
            if part == parts[0]:
                joined = [tensors[prefix + other + leaf] for other in parts]
                out[f"{prefix}attn.{layers[part]}{leaf}"] = np.concatenate(joined)
        else:
            out[name] = tensor
    return out


def load_stage(model: StageB | StageC, path: str | Path) -> dict:
    """The model's params from diffusers' .safetensors, or from one of the authors' .pt files (which needs torch).

    Raises FileNotFoundError and ValueError naming the file and what is wrong with it.
    """
    what = f"weights of Würstchen v2's {type(model).__name__}"
    return from_state_dict(model, read_state_dict(path, what, REMEDY, ENTRIES), str(path))


def _stage_c_modules(model: StageC, module: LeafPath) -> tuple[list[str], str]:
    """PyTorch's names of one of our modules, one a layer of its stack, and the kind of layer."""
    if module[0] != "blocks":
        name, kind = STAGE_C[module[0]]
        return [name], kind
    slot, name, kind = BLOCK["/".join(module[1:])]
    return [f"blocks.{3 * layer + slot}.{name}" for layer in range(model.depth)], kind


def _stage_b_modules(model: StageB, module: LeafPath) -> tuple[list[str], str]:
    """As `_stage_c_modules`. PyTorch counts a level's resampling among its blocks: first going down, last going up."""
    if module[0] in STAGE_B:
        name, kind = STAGE_B[module[0]]
        return [name], kind
    part, index = module[0].split("_")
    index, levels = int(index), len(model.c_hidden)
    if part == "downsample":
        return [f"down_blocks.{index + 1}.0.1"], "conv"
    up = part.startswith("up")
    level = levels - 1 - index if up else index
    width, count = len(model.level_config[level]), model.blocks[level]
    if part == "upsample":
        return [f"up_blocks.{index}.{width * count}.1"], "transposed"
    if module[1] == "effnet_mapper":
        return [f"effnet_mappers.{index + levels * up}"], "pointwise"
    slot, name, kind = BLOCK["/".join(module[2:])]
    kept_apart = up and level < levels - 1
    layers = [0] if module[1] == "first" else range(int(kept_apart), count)
    before = 0 if up or level == 0 else 1
    return [f"{part}_blocks.{index}.{before + width * layer + slot}.{name}" for layer in layers], kind
