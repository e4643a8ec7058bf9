"""Public weights of CIFAR-10's ResNet-56 (akamaster/pytorch_resnet_cifar10) -> params of `features.resnet56`."""

from pathlib import Path

import jax
import jax.numpy as jnp

from fid_imagegen.interop.state_dict import TORCH_LEAVES, convert_state_dict, read_state_dict
from fid_imagegen.models.features.resnet56 import ResNet56

NORM_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
REMEDY = "give the path of cifar10_resnet56.npz, or evaluate with the features 'pixels'"


def load_resnet56(path: str | Path) -> dict:
    """Params of `ResNet56`, float32, from cifar10_resnet56.npz: 93.39 % of CIFAR-10's test images, as published.

    Raises FileNotFoundError naming the file, ValueError listing tensors that do not fit.
    """
    tensors = read_state_dict(path, "the CIFAR-10 ResNet-56 weights under their PyTorch names", REMEDY)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    template = jax.eval_shape(ResNet56().init, jax.random.key(0), image)["params"]
    return convert_state_dict(tensors, template, torch_name, str(path))


def torch_name(path: tuple[str, ...]) -> str:
    """("layer1_0", "bn1", "scale") -> "layer1.0.bn1.weight"."""
    *modules, leaf = path
    leaves = NORM_LEAVES if modules[-1].startswith("bn") else TORCH_LEAVES
    return f"{'.'.join(modules).replace('_', '.')}.{leaves[leaf]}"
