"""diffusers' AutoencoderKL (the VAE of Stable Diffusion) <-> params of `models.autoencoder_kl`."""

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from fid_imagegen.interop.state_dict import KERNEL_LAYOUTS, TORCH_LEAVES, convert_state_dict, read_state_dict
from fid_imagegen.models.autoencoder_kl import AutoencoderKL

# Attention's names in files from before diffusers 0.17, Stable Diffusion 1's among them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
REMEDY = "download the folder vae of a Stable Diffusion repository and give its diffusion_pytorch_model.safetensors"


def load_autoencoder_kl(model: AutoencoderKL, path: str | Path) -> dict:
    """The model's params in float32 from diffusers' weights (.safetensors, .npz, or .pt).

    Raises FileNotFoundError naming the file, ValueError listing tensors that do not fit.
    """
    return from_state_dict(model, read_state_dict(path, "an AutoencoderKL of diffusers", REMEDY), str(path))


def from_state_dict(model: AutoencoderKL, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """As `load_autoencoder_kl`, from tensors by name, old or new."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: m[1] + OLD_NAMES[m[2]], name)
        # Some old files keep attention's matrices as 1x1 convolutions.
        is_matrix = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        renamed[name] = np.squeeze(tensor, (2, 3)) if is_matrix and np.ndim(tensor) == 4 else tensor
    return convert_state_dict(renamed, abstract_params(model), torch_name, source)


def to_state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under diffusers' names, which `load_state_dict` there takes strictly."""

    def tensor(path, leaf):
        if path[-1] != "kernel":
            return np.asarray(leaf)
        theirs, ours = KERNEL_LAYOUTS[leaf.ndim].split(" -> ")
        return np.ascontiguousarray(rearrange(np.asarray(leaf), f"{ours} -> {theirs}"))

    return {torch_name(path): tensor(path, leaf) for path, leaf in flatten_dict(params).items()}


def abstract_params(model: AutoencoderKL) -> dict:
    """Shapes and types of the model's params; no memory is taken."""
    side = 2 ** (len(model.block_out_channels) - 1)
    image = jax.ShapeDtypeStruct((1, side, side, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def torch_name(path: tuple[str, ...]) -> str:
    """("encoder", "down_blocks_0", "resnets_1", "norm1", "scale") -> "encoder.down_blocks.0.resnets.1.norm1.weight"."""
    *modules, leaf = path
    numbered = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*numbered, (TORCH_LEAVES | {"scale": "weight"})[leaf]])
