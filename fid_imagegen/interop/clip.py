"""Public weights of CLIP's text towers, Hugging Face's names <-> params of `CLIPTextEncoder`."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.interop.state_dict import convert_state_dict, read_state_dict
from fid_imagegen.models.text.clip import CLIPTextEncoder

BLOCKS = ("transformer", "blocks")
BLOCK_MODULES = {
    "norm_attention": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm_mlp": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
OUTER = {
    ("transformer", "token", "embedding"): "text_model.embeddings.token_embedding.weight",
    ("transformer", "position"): "text_model.embeddings.position_embedding.weight",
    ("transformer", "norm", "scale"): "text_model.final_layer_norm.weight",
    ("transformer", "norm", "bias"): "text_model.final_layer_norm.bias",
    ("projection", "kernel"): "text_projection.weight",
}
# The fields of an encoder in Hugging Face's config.json, and the values that a nested text_config leaves out.
FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "vocabulary": "vocab_size",
    "length": "max_position_embeddings",
    "activation": "hidden_act",
}
DEFAULTS = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
WHAT = "the weights of a CLIP text tower: model.safetensors, model.safetensors.index.json with its shards, or one file"
REMEDY = "give the folder or file that Hugging Face's CLIPTextModel is saved in"


def load_clip(path: str | Path, encoder: CLIPTextEncoder) -> dict:
    """Params of `encoder`, float32, from a weights file or from a folder as Hugging Face saves it.

    Read: CLIPTextModel, CLIPTextModelWithProjection and whole CLIPModels, whose image side is left out. text_projection
    is kept if `encoder.projection` is a width and left out if it is None.
    Raises FileNotFoundError naming the files looked for, ValueError listing tensors that do not fit or fields that differ
    from the folder's config.json.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        if (path / "config.json").is_file():
            check_config(json.loads((path / "config.json").read_text()), encoder, str(path / "config.json"))
        files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
        if index.is_file() and not files[0].is_file():
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    tensors = {name: x for file in files for name, x in read_state_dict(file, WHAT, REMEDY).items()}
    return convert_clip(tensors, encoder, str(path))


def check_config(config: Mapping, encoder: CLIPTextEncoder, source: str) -> None:
    """ValueError if a tower of Hugging Face's config, nested in a CLIPModel's or not, is not `encoder`'s.

    Heads and activation leave no trace in the weights: without this they could be wrong in silence.
    """
    config = DEFAULTS | config.get("text_config", config)
    end = config["eos_token_id"]
    theirs = {field: config[name] for field, name in FIELDS.items()} | {"epsilon": config["layer_norm_eps"]}
    theirs["end"] = config["vocab_size"] - 1 if end == 2 else end  # 2: an old mistake, see CLIPTextEncoder
    ours = {field: getattr(encoder, field) for field in (*FIELDS, "end")} | {"epsilon": 1e-5}
    if wrong := [f"{field} {theirs[field]!r} for {ours[field]!r}" for field in theirs if theirs[field] != ours[field]]:
        raise ValueError(
            f"found {', '.join(wrong)} in {source}, expected the encoder's own; choose the encoder these weights are of"
        )


def convert_clip(tensors: Mapping[str, np.ndarray], encoder: CLIPTextEncoder, source: str) -> dict:
    """As `load_clip`, from tensors by name."""
    # transformers 5 saves a CLIPTextModel without the prefix that every older file has.
    bare = "final_layer_norm.weight" in tensors
    tensors = {f"text_model.{name}" if bare else name: x for name, x in tensors.items()}
    image_side = ("vision_model.", "visual_projection.", "logit_scale")
    position_ids = "text_model.embeddings.position_ids"  # a constant that transformers saved before 4.31
    tensors = {n: x for n, x in tensors.items() if not n.startswith(image_side) and n != position_ids}
    if encoder.projection is None:
        tensors.pop("text_projection.weight", None)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    template = jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]
    leaves = flatten_dict(convert_state_dict(tensors, jax.eval_shape(unstacked, template), torch_name, source))
    blocks = {
        path[3:]: [leaves.pop((*BLOCKS, str(i), *path[3:])) for i in range(encoder.layers)]
        for path in list(leaves)
        if path[:3] == (*BLOCKS, "0")
    }
    return unflatten_dict(leaves | {(*BLOCKS, *path): np.stack(xs) for path, xs in blocks.items()})


def unstacked(params: Mapping) -> dict:
    """The tree with its stacked blocks [L, ...] one by one, under the keys "0", "1", ..."""
    leaves = {}
    for path, x in flatten_dict(params).items():
        if path[:2] == BLOCKS:
            leaves |= {(*BLOCKS, str(i), *path[2:]): x[i] for i in range(x.shape[0])}
        else:
            leaves[path] = x
    return unflatten_dict(leaves)


def clip_state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """Params of a `CLIPTextEncoder` as tensors under the names of CLIPTextModel, or ...WithProjection if they hold one."""
    leaves = flatten_dict(unstacked(params))
    return {torch_name(path): rearrange(x, "i o -> o i") if path[-1] == "kernel" else x for path, x in leaves.items()}


def save_clip(path: str | Path, params: Mapping) -> None:
    """Writes params of a `CLIPTextEncoder` to a model.safetensors that transformers loads."""
    save_tree(path, clip_state_dict(params), {"format": "pt"})


def torch_name(path: tuple[str, ...]) -> str:
    """("transformer", "blocks", "3", "query", "kernel") -> "text_model.encoder.layers.3.self_attn.q_proj.weight"."""
    if path in OUTER:
        return OUTER[path]
    _, _, block, module, leaf = path
    return f"text_model.encoder.layers.{block}.{BLOCK_MODULES[module]}.{LEAVES[leaf]}"
