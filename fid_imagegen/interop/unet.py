"""diffusers' UNet2DModel (the public consistency models of ImageNet 64) <-> params of `models.unets.adm`.

Of its configurations those of ADM: `resnet_time_scale_shift="scale_shift"`, `downsample_type="resnet"` and
`upsample_type="resnet"`. Its timesteps are 1000 * ln(sigma) / 4: the level that `ADM` takes, times its `level_scale`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fid_imagegen.interop.state_dict import LEAVES, convert_state_dict, named_tensors, read_state_dict
from fid_imagegen.models.unets.adm import ADM
from fid_imagegen.models.unets.presets import UNETS

REMEDY = (
    "download the folder unet of openai/diffusers-cd_imagenet64_l2 and give its diffusion_pytorch_model.safetensors"
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = (
    "sample_size",
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "attention_head_dim",
)
# What diffusers assumes where a config.json is silent; all but the first an ADM always has.
DEFAULTS = {
    "norm_num_groups": 32,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_type": "positional",
}


def public_unet(folder: Path, config: ConfigDict) -> tuple[ConfigDict, dict]:
    """(`config` with the size of the UNet2DModel in diffusers' `folder`, its params).

    Raises FileNotFoundError naming the file, ValueError for another network and for tensors that do not fit.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"found no file {str(file)!r}, expected a UNet2DModel's; {REMEDY}")
    theirs = json.loads(file.read_text(encoding="utf-8"))
    fields = adm_fields(theirs, str(file))
    config = config.copy_and_resolve_references().unlock()
    config.data.update({"image_size": theirs["sample_size"], "channels": fields.pop("channels")})
    config.model.update({"network": "unet", "preset": "adm_64", "num_classes": fields.pop("num_classes")})
    # What the preset says is left to it, so that training by the same recipe may start from this model.
    config.model.unet.update({name: value for name, value in fields.items() if value != UNETS["adm_64"][name]})
    model = ADM(config.data.channels, num_classes=config.model.num_classes, **fields)
    return config.lock(), load_unet(model, folder / WEIGHTS)


def adm_fields(theirs: Mapping, source: str) -> dict:
    """The fields of the ADM that a UNet2DModel's config.json describes. ValueError for what no ADM is."""
    if missing := [name for name in NEEDED if name not in theirs]:
        raise ValueError(f"found no {', '.join(missing)} in {source}, expected the config of a UNet2DModel; {REMEDY}")
    fields = {
        "channels": theirs["in_channels"],
        "widths": tuple(theirs["block_out_channels"]),
        "blocks": theirs["layers_per_block"],
        "attention_levels": tuple(i for i, kind in enumerate(theirs["down_block_types"]) if kind.startswith("Attn")),
        "head_width": theirs["attention_head_dim"],
        "groups": theirs.get("norm_num_groups", DEFAULTS["norm_num_groups"]),
        "num_classes": theirs.get("num_class_embeds") or 0,
    }
    wanted = DEFAULTS | json.loads(json.dumps(diffusers_config(ADM(**fields))))
    found = {name: theirs.get(name, DEFAULTS.get(name)) for name in wanted}
    if differing := [
        f"{name} {found[name]!r}, expected {wanted[name]!r}" for name in wanted if found[name] != wanted[name]
    ]:
        raise ValueError(f"found a network in {source} of {'; '.join(differing)}; give one of ImageNet 64")
    return fields


def load_unet(model: ADM, path: str | Path) -> dict:
    """The model's params in float32 from diffusers' weights (.safetensors, .npz, or .pt).

    Raises FileNotFoundError naming the file, ValueError listing tensors that do not fit.
    """
    return from_state_dict(model, read_state_dict(path, "a UNet2DModel of diffusers", REMEDY), str(path))


def from_state_dict(model: ADM, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """As `load_unet`, from tensors by name."""
    return convert_state_dict(tensors, abstract_params(model), torch_name, source)


def to_state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under diffusers' names, which `load_state_dict` there takes strictly."""
    return {name: np.ascontiguousarray(leaf) for name, leaf in named_tensors(params, torch_name).items()}


def diffusers_config(model: ADM) -> dict:
    """The fields of the UNet2DModel that `model` is: at the public model's widths, openai/diffusers-cd_imagenet64_l2."""
    with_attention = [level in model.attention_levels for level in range(len(model.widths))]
    return {
        "in_channels": model.channels,
        "out_channels": model.channels,
        "block_out_channels": model.widths,
        "layers_per_block": model.blocks,
        "attention_head_dim": model.head_width,
        "norm_num_groups": model.groups,
        "attn_norm_num_groups": model.groups,
        "num_class_embeds": model.num_classes or None,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in with_attention],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(with_attention)],
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }


def abstract_params(model: ADM) -> dict:
    """Shapes and types of the model's params; no memory is taken."""
    side = 2 ** (len(model.widths) - 1)
    image = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
    level, label = jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), image, level, label)["params"]


def torch_name(path: tuple[str, ...]) -> str:
    """("down_blocks_0", "resnets_1", "norm1", "scale") -> "down_blocks.0.resnets.1.norm1.weight"."""
    *modules, leaf = path
    # linear_1 and linear_2 are names there, not positions in a list.
    numbered = [re.sub(r"(?<!^linear)_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*numbered, (LEAVES | {"embedding": "weight"})[leaf]])
