"""Named features for Fréchet distances. Only Inception-v3's would make an FID, and it is not among them."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from einops import pack, rearrange, reduce
from jaxtyping import Float, UInt8

from fid_imagegen.interop.resnet56 import load_resnet56
from fid_imagegen.models.features.resnet56 import ResNet56
from fid_imagegen.tasks.augmentation import augmentation_net
from fid_imagegen.tasks.generator import to_float
from fid_imagegen.training.runs import read_params

Extract = Callable[[UInt8[np.ndarray, "batch height width channels"]], Float[np.ndarray, "batch features"]]
BATCH = 500


def check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"found {images.dtype} {images.shape}, expected uint8 [N, H, W, C]; round to uint8 at the edge"
        )


def pixels() -> Extract:
    """Flattened pixels scaled to [-1, 1] (x / 127.5 - 1), D = H * W * C.

    The scale sets the unit of the distance: two random halves of sklearn's digits (8x8) lie 0.296 +- 0.032 apart here
    (20 seeds; 0.28 in the project's first probe), against 0.074 in [0, 1] and 19.0 in grey levels 0 to 16.
    """

    def extract(images):
        check_images(images)
        return rearrange(images, "n h w c -> n (h w c)") / 127.5 - 1

    return extract


def resnet56(weights: str | Path) -> Extract:
    """The 64 globally averaged features of CIFAR-10's ResNet-56; `weights` is the path of cifar10_resnet56.npz.

    Images must be 32x32 RGB: a resize would be part of the metric, so it is the caller's to choose and to state.
    """
    params = load_resnet56(weights)
    forward = jax.jit(lambda images: ResNet56().apply({"params": params}, images / 127.5 - 1)[0])

    def extract(images):
        check_images(images)
        if images.shape[1:] != (32, 32, 3):
            raise ValueError(f"found images {images.shape[1:]}, expected (32, 32, 3); resize them first and say how")
        return _in_batches(forward, images)

    return extract


def augmentations(weights: str | Path) -> Extract:
    """The globally averaged maps of the last two stages of an augmentation net; `weights` is the folder of its run.

    No judge between a generator that the same run's distance has trained and one that it has not.
    """
    config, groups = read_params(weights)
    if "augmentation_net" not in groups:
        raise ValueError(
            f"found groups {sorted(groups)} in {weights}, expected augmentation_net; give a run of configs/augmentation_net.py"
        )
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    net = augmentation_net(config.model.widths, config.data.channels)

    @jax.jit
    def forward(images):
        _, maps = net.apply({"params": groups["augmentation_net"]}, to_float(images))
        return pack([reduce(each, "b h w c -> b c", "mean") for each in maps[-2:]], "b *")[0]

    def extract(images):
        check_images(images)
        if images.shape[1:] != shape:
            raise ValueError(
                f"found images {images.shape[1:]}, expected {shape}, on which {weights} was trained; give such"
            )
        return _in_batches(forward, images)

    return extract


def _in_batches(forward, images):
    """float64 features of all images."""
    batch = min(BATCH, len(images))
    padding = np.zeros((-len(images) % batch, *images.shape[1:]), np.uint8)  # one shape, one compilation
    padded = np.concatenate([images, padding])
    features = [np.asarray(forward(padded[i : i + batch]), np.float64) for i in range(0, len(padded), batch)]
    return np.concatenate(features)[: len(images)]


FEATURES: dict[str, Callable[..., Extract]] = {
    "augmentations": augmentations,
    "pixels": pixels,
    "resnet56": resnet56,
}
