"""Public weights of LPIPS v0.1, torchvision's VGG16 and the authors' linear heads -> params of `features.lpips`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.interop.state_dict import TORCH_LEAVES, convert_state_dict, read_state_dict
from fid_imagegen.models.features.lpips import LPIPS
from fid_imagegen.models.features.vgg16 import STAGES

# Positions of the 13 convolutions in torchvision's `features`, which counts ReLUs and pools too.
VGG16_NAMES = [f"conv{stage}_{index + 1}" for stage, (_, n) in enumerate(STAGES, start=1) for index in range(n)]
VGG16_POSITIONS = dict(zip(VGG16_NAMES, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True))
REMEDY = (
    "put the file there, or do without: set config.distance='l2' for image functions, "
    "config.STAGE.objective.perceptual='laplacian' for Stage A and the previewer"
)


def load_lpips(vgg16_path: str | Path, heads_path: str | Path) -> dict:
    """Params for `lpips_distance`, float32.

    `vgg16_path`: torchvision's state dict, e.g. vgg16-397923af.pth, or the same as .safetensors or .npz; its classifier
    is not used. `heads_path`: lpips_v0.1_linear_heads.npz (vgg.lin0.model.1.weight ...) or the authors'
    weights/v0.1/vgg.pth (lin0.model.1.weight ...).
    Raises FileNotFoundError naming the file, ValueError listing tensors that do not fit.
    """
    vgg16 = read_state_dict(vgg16_path, "torchvision's VGG16 ImageNet weights (vgg16-397923af.pth)", REMEDY)
    heads = read_state_dict(heads_path, "the LPIPS v0.1 linear heads (lpips_v0.1_linear_heads.npz or vgg.pth)", REMEDY)
    return convert_lpips(vgg16, heads, f"{vgg16_path} and {heads_path}")


def convert_lpips(vgg16: dict[str, np.ndarray], heads: dict[str, np.ndarray], source: str) -> dict:
    """As `load_lpips`, from tensors by name."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    template = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
    # The heads' file holds three backbones, each under its name; each head is a 1x1 convolution to one channel.
    heads = {k.removeprefix("vgg."): np.squeeze(v) for k, v in heads.items() if not k.startswith(("alex.", "squeeze."))}
    trunk = {k: v for k, v in vgg16.items() if not k.startswith("classifier.")}
    return convert_state_dict(trunk | heads, template, torch_name, source)


def torch_name(path: tuple[str, ...]) -> str:
    if path[0] == "vgg16":
        _, convolution, leaf = path
        return f"features.{VGG16_POSITIONS[convolution]}.{TORCH_LEAVES[leaf]}"
    return f"{path[0]}.model.1.weight"
