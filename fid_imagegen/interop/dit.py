"""diffusers' DiTTransformer2DModel (DiT-XL/2 of ImageNet) <-> params of `models.dit`.

Two things in diffusers are not the authors', whose code trained the public weights and whose function `DiT` is. Its level
frequencies are 10000^(-k/127) in place of 10000^(-k/128), which agrees at level 0 only, and the config.json of the weights
gives the norm before the MLP an epsilon of 1e-5 in place of 1e-6.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from fid_imagegen.interop.state_dict import TORCH_LEAVES, convert_state_dict, named_tensors, read_state_dict
from fid_imagegen.models.dit import DiT, column_row_positions
from fid_imagegen.models.layers import BlockStyle

EXTRACTOR, BLOCKS = ("extractor",), ("extractor", "blocks")
PATCHES = ("patches", "kernel")
POSITIONS = "pos_embed.pos_embed"  # in files from before diffusers stopped saving it
OUTER = {"patches": "pos_embed.proj", "modulation": "proj_out_1", "head": "proj_out_2"}
BLOCK_MODULES = {
    "level/Dense_0": "norm1.emb.timestep_embedder.linear_1",
    "level/Dense_1": "norm1.emb.timestep_embedder.linear_2",
    "label": "norm1.emb.class_embedder.embedding_table",
    "modulation": "norm1.linear",
    "attention/query": "attn1.to_q",
    "attention/key": "attn1.to_k",
    "attention/value": "attn1.to_v",
    "attention/out": "attn1.to_out.0",
    "attention/query_norm": "attn1.norm_q",
    "attention/key_norm": "attn1.norm_k",
    "mlp/up": "ff.net.0.proj",
    "mlp/down": "ff.net.2",
}
LEAVES = TORCH_LEAVES | {"scale": "weight", "embedding": "weight"}
REMEDY = "download the folder transformer of facebook/DiT-XL-2-256 and give its diffusion_pytorch_model"


def load_dit(model: DiT, path: str | Path) -> dict:
    """The model's params in float32 from diffusers' weights (.safetensors, .npz, or .pt).

    The public weights are of DiT(**PUBLIC_DIT), whose levels are steps 0..999; a `level_scale` of 1000 takes step / 1000.
    Raises FileNotFoundError naming the file, ValueError listing tensors that do not fit, or embedders that differ.
    """
    return from_state_dict(model, read_state_dict(path, "a DiTTransformer2DModel of diffusers", REMEDY), str(path))


def from_state_dict(model: DiT, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """As `load_dit`, from tensors by name."""
    weights = {name: tensor for name, tensor in tensors.items() if name != POSITIONS}
    template = jax.eval_shape(functools.partial(per_block, model), abstract_params(model))
    params = _stacked(model, convert_state_dict(weights, template, torch_name, source), source)
    if POSITIONS in tensors:
        _check_positions(tensors[POSITIONS], model.width, source)
    return params


def to_state_dict(model: DiT, params: Mapping) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under diffusers' names, which `load_state_dict` there takes strictly.

    diffusers knows neither a DiT without labels nor one with normed queries and keys.
    """
    return named_tensors(per_block(model, params), torch_name)


def abstract_params(model: DiT) -> dict:
    """Shapes and types of the model's params; no memory is taken."""
    image = jax.ShapeDtypeStruct((1, model.patch, model.patch, model.channels), jnp.float32)
    level, label = jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), image, level, label)["params"]


def per_block(model: DiT, params: Mapping) -> dict:
    """The tree as diffusers has it: patches by a convolution, and blocks under "0", "1", ..., each with its own embedders.

    ValueError for blocks of a style that diffusers has not: of norm and rotary the tensors would not tell.
    """
    if dataclasses.replace(model.style, qk_norm=False) != BlockStyle():
        raise ValueError(
            f"found a DiT of {model.style}, expected norm='layer', mlp='gelu' and rotary=False, all that diffusers has; "
            "export other styles with python -m fid_imagegen.export"
        )
    leaves = {}
    for path, x in flatten_dict(params).items():
        if path[:2] == BLOCKS:
            leaves |= {(*BLOCKS, str(i), *path[2:]): x[i] for i in range(model.depth)}
        elif path[:1] == EXTRACTOR:
            leaves |= {(*BLOCKS, str(i), *path[1:]): x for i in range(model.depth)}
        else:
            leaves[path] = x
    leaves[PATCHES] = rearrange(leaves[PATCHES], "(p q i) o -> p q i o", p=model.patch, q=model.patch)
    return unflatten_dict(leaves)


def torch_name(path: tuple[str, ...]) -> str:
    """("extractor", "blocks", "3", "mlp", "up", "kernel") -> "transformer_blocks.3.ff.net.0.proj.weight"."""
    *modules, leaf = path
    if path[:2] != BLOCKS:
        return f"{OUTER[modules[0]]}.{LEAVES[leaf]}"
    return f"transformer_blocks.{modules[2]}.{BLOCK_MODULES['/'.join(modules[3:])]}.{LEAVES[leaf]}"


def _stacked(model: DiT, tree: Mapping, source: str) -> dict:
    """The inverse of `per_block`."""
    leaves = flatten_dict(tree)
    leaves[PATCHES] = rearrange(leaves[PATCHES], "p q i o -> (p q i) o")
    differing = []
    for path in [path[3:] for path in leaves if path[:3] == (*BLOCKS, "0")]:
        copies = {(*BLOCKS, str(i), *path): leaves.pop((*BLOCKS, str(i), *path)) for i in range(model.depth)}
        first, *others = copies.values()
        if path[0] not in ("level", "label"):
            leaves[(*BLOCKS, *path)] = np.stack([first, *others])
            continue
        differing += [torch_name(name) for name, copy in copies.items() if not np.array_equal(copy, first)]
        leaves[(*EXTRACTOR, *path)] = first
    if differing:
        raise ValueError(
            f"found {', '.join(differing)} unlike those of block 0 in {source}, expected one embedder of levels and labels in as "
            "many copies as there are blocks, as in the authors' weights; tie them in training"
        )
    return unflatten_dict(leaves)


def _check_positions(positions: np.ndarray, width: int, source: str) -> None:
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    expected = column_row_positions(side, side, width)[None]
    if positions.shape != expected.shape or np.abs(positions - expected).max() > 1e-3:
        raise ValueError(
            f"found {POSITIONS} {positions.shape} in {source} that are not sin-cos of column and row, expected the fixed "
            "positions of DiT; use weights that were trained with them"
        )
