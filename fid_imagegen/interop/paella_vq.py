"""Stage A of Würstchen: variables of `PaellaVQ` <-> state dicts of diffusers' PaellaVQModel or the authors' (dome272)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.interop.state_dict import LEAVES, convert_state_dict, named_tensors, without_counters
from fid_imagegen.models.wuerstchen.stage_a import PaellaVQ

BLOCK = {"depthwise": "depthwise.1", "up": "channelwise.0", "down": "channelwise.2"}
CODEBOOK, AUTHORS_CODEBOOK = "vquantizer.embedding.weight", "vquantizer.codebook.weight"
STACK = "bottleneck"


def from_state_dict(model: PaellaVQ, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """{"params", "batch_stats"} in float32, from tensors under diffusers' names or the authors'.

    ValueError lists every missing, extra and misshapen tensor at once; `source` says where they were looked for.
    """
    tensors = {CODEBOOK if name == AUTHORS_CODEBOOK else name: tensor for name, tensor in tensors.items()}
    template = jax.eval_shape(lambda: _split_stack(_init(model)))
    return _join_stack(convert_state_dict(without_counters(tensors), template, _namer(model), source))


def to_state_dict(model: PaellaVQ, variables: Mapping, *, authors: bool) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's layout under diffusers' names, or with `authors` under theirs; both load them strictly."""
    tensors = named_tensors(_split_stack(variables), _namer(model))
    if authors:
        tensors[AUTHORS_CODEBOOK] = tensors.pop(CODEBOOK)
    return tensors


def _init(model: PaellaVQ):
    image = jnp.zeros((1, model.stride, model.stride, model.image_channels))
    return model.init(jax.random.key(0), image, train=False)


def _split_stack(variables: Mapping) -> dict:
    """The stacked blocks as modules of their own, as PyTorch has them."""
    params = dict(variables["params"])
    stacked = params.pop(STACK)
    layers = {f"{STACK}_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(stacked["gammas"]))}
    return {**variables, "params": params | layers}


def _join_stack(variables: Mapping) -> dict:
    params = dict(variables["params"])
    layers = [params.pop(f"{STACK}_{i}") for i in range(sum(name.startswith(STACK) for name in params))]
    return {**variables, "params": params | {STACK: jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}}


def _namer(model: PaellaVQ) -> Callable[[tuple[str, ...]], str]:
    """torch_name of a path into the split variables: ("params", "up_convs_0", "kernel") -> "up_blocks.13.weight"."""
    levels, blocks = len(model.levels), model.bottleneck_blocks
    modules = {
        "patch_in": "in_block.1",
        "to_latents": f"down_blocks.{2 * levels - 1}.0",
        "latent_norm": f"down_blocks.{2 * levels - 1}.1",
        "from_latents": "up_blocks.0.0",
        "patch_out": "out_block.0",
    }
    modules |= {f"down_blocks_{level}": f"down_blocks.{2 * level}" for level in range(levels)}
    modules |= {f"{STACK}_{layer}": f"up_blocks.{1 + layer}" for layer in range(blocks)}
    for step in range(levels - 1):
        modules[f"down_convs_{step}"] = f"down_blocks.{2 * step + 1}"
        modules[f"up_convs_{step}"] = f"up_blocks.{1 + blocks + 2 * step}"
        modules[f"up_blocks_{step}"] = f"up_blocks.{2 + blocks + 2 * step}"

    def torch_name(path: tuple[str, ...]) -> str:
        _, module, *inner = path
        if module == "codebook":
            return CODEBOOK
        *layer, leaf = inner
        return ".".join([modules[module], *(BLOCK[name] for name in layer), LEAVES.get(leaf, leaf)])

    return torch_name
