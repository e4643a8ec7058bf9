"""The network of a config: the generator of image functions, or one of its rivals of one fixed size."""

import dataclasses

import jax.numpy as jnp

from fid_imagegen.models.dit import DITS, DiT
from fid_imagegen.models.function_generator import PRESETS, FunctionGenerator, function_kind
from fid_imagegen.models.layers import BlockStyle
from fid_imagegen.models.unets.presets import UNETS, build_unet
from fid_imagegen.models.uvit import UVITS, UViT

FUNCTION_FIELDS = {
    "function_width": "width",
    "function_depth": "depth",
    "function_features": "features",
    "bands": "bands",
    "groups": "groups",
    "integrated": "integrated",
}


def build_generator(config):
    """The network of `config.model` at the size of its grid: model(x_BHWC, levels_BK, label_B, deterministic=).

    Fields left None take the preset's value. ValueError names what is unknown or does not fit.
    """
    network = config.model.network
    if network not in NETWORKS:
        raise ValueError(f"found network {network!r}, expected one of {sorted(NETWORKS)}; change config.model.network")
    return NETWORKS[network](config)


def grid_size(config) -> int:
    """Pixels a side of what the network sees."""
    return config.grid or config.data.image_size


def _function(config) -> FunctionGenerator:
    model, sizes = config.model, _sizes(config.model, PRESETS)
    kind = function_kind(
        sizes.pop("function"),
        channels=config.data.channels,
        image_size=grid_size(config),
        patch=model.patch,
        cutoff=model.cutoff,
        activation=model.activation,
        weight_update=model.weight_update,
        dtype=model.dtype,
        **{name: model[field] for field, name in FUNCTION_FIELDS.items() if model[field] is not None},
    )
    return FunctionGenerator(kind=kind, image_size=grid_size(config), **sizes, **_common(model), style=_style(model))


def _dit(config) -> DiT:
    model = config.model
    return DiT(channels=config.data.channels, **_sizes(model, DITS), **_common(model), style=_style(model))


def _uvit(config) -> UViT:
    model, size = config.model, 2 * (grid_size(config),)
    _check_unstyled(model, but="qk_norm")
    own = {"channels": config.data.channels, "qk_norm": model.qk_norm}
    return UViT(size, **own, **_sizes(model, UVITS), **_common(model))


def _unet(config):
    model = config.model
    _check_unstyled(model)
    fields = {name: model[name] for name in ("num_classes", "dropout", "remat")} | {"dtype": jnp.dtype(model.dtype)}
    if UNETS.get(model.preset, {}).get("architecture") == "adm":  # the others' embeddings have scales of their own
        fields["level_scale"] = model.level_scale
    for name, value in model.unet.items():
        if value is not None:
            fields[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    return build_unet(model.preset, channels=config.data.channels, **fields)


def _sizes(model, presets: dict) -> dict:
    """The preset's fields, those that the config gives in their places."""
    if model.preset not in presets:
        raise ValueError(
            f"found preset {model.preset!r} of network {model.network!r}, expected one of {sorted(presets)}; "
            "change config.model.preset"
        )
    return {name: value if model[name] is None else model[name] for name, value in presets[model.preset].items()}


def _common(model) -> dict:
    fields = ("patch", "num_classes", "level_scale", "dropout", "remat", "unroll")
    return {name: model[name] for name in fields} | {"dtype": jnp.dtype(model.dtype)}


def _style(model) -> BlockStyle:
    return BlockStyle(**{field.name: model[field.name] for field in dataclasses.fields(BlockStyle)})


def _check_unstyled(model, *, but: str = "") -> None:
    for field in dataclasses.fields(BlockStyle):
        if field.name != but and model[field.name] != field.default:
            raise ValueError(
                f"found model.{field.name} with network {model.network!r}, which has no such choice; "
                f"set config.model.{field.name}={field.default!r}"
            )


NETWORKS = {"dit": _dit, "function": _function, "unet": _unet, "uvit": _uvit}
