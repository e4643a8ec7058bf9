"""EfficientNetV2: variables of `EfficientNetV2Features` <-> torchvision's `features.*`, and of `EfficientNetCompressor` <->
Würstchen's `effnet_state_dict` (`backbone.*`, `mapper.*`)."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.interop.state_dict import (
    LEAVES,
    convert_state_dict,
    named_tensors,
    read_state_dict,
    without_counters,
)
from fid_imagegen.models.wuerstchen.compressor import EfficientNetCompressor
from fid_imagegen.models.wuerstchen.efficientnet import EfficientNetV2Features, resolve_spec

CONV_NORM = {"conv": "0", "norm": "1"}
FUSED = {"expand": "0", "project": "1"}
INVERTED = {"expand": "0", "depthwise": "1", "excite": "2", "project": "3"}
WHAT = (
    "torchvision's ImageNet weights of EfficientNetV2 (efficientnet_v2_s-dd5fe13b.pth, efficientnet_v2_l-59c71312.pth)"
)
REMEDY = "download it from https://download.pytorch.org/models/, or set config.compressor.weights=''"


def load_features(model: EfficientNetV2Features, path: str | Path) -> dict:
    """{"params", "batch_stats"} in float32 of torchvision's state dict, as .pth, .safetensors or .npz.

    Raises FileNotFoundError and ValueError naming the file and what is wrong with it.
    """
    return from_state_dict(model, read_state_dict(path, WHAT, REMEDY), str(path))


def from_state_dict(
    model: EfficientNetV2Features | EfficientNetCompressor, tensors: Mapping[str, np.ndarray], source: str
) -> dict:
    """{"params", "batch_stats"} in float32; of torchvision's whole classifier the last layer is left out.

    ValueError lists every missing, extra and misshapen tensor at once; `source` says where they were looked for.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    return convert_state_dict(without_counters(tensors), template, _namer(model), source)


def to_state_dict(model: EfficientNetV2Features | EfficientNetCompressor, variables: Mapping) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under the names of the model's counterpart, without torchvision's classifier."""
    return named_tensors(variables, _namer(model))


def _namer(model: EfficientNetV2Features | EfficientNetCompressor) -> Callable[[tuple[str, ...]], str]:
    """torch_name of a path into the variables: ("params", "stage1_0", "expand", "conv", "kernel") ->
    "features.1.0.block.0.0.weight"."""
    stages = resolve_spec(model.variant).stages

    def feature_name(module: str, *inner: str) -> list[str]:
        if module in ("stem", "head"):
            index = "0" if module == "stem" else str(len(stages) + 1)
            return [index, CONV_NORM[inner[0]]]
        stage, block = module.removeprefix("stage").split("_")
        layer, *rest = inner
        index = (FUSED if stages[int(stage) - 1].fused else INVERTED)[layer]
        return [stage, block, "block", index, *(CONV_NORM.get(name, name) for name in rest)]

    def torch_name(path: tuple[str, ...]) -> str:
        _, *modules, leaf = path
        if isinstance(model, EfficientNetV2Features):
            names = ["features", *feature_name(*modules)]
        elif modules[0] == "backbone":
            names = ["backbone", *feature_name(*modules[1:])]
        else:
            names = ["mapper", CONV_NORM[modules[1]]]
        return ".".join([*names, LEAVES[leaf]])

    return torch_name
