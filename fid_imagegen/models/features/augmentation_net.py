"""A small VGG that names the augmentation of an image, and AYT's distance of its features (Kim et al. 2025, arXiv 2510.00658)."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Maps = list[Float[Array, "batch h w features"]]


class AugmentationNet(nn.Module):
    """Stages of two 3x3 convolutions, each rectified, and a 2x2 max-pool; then the mean and a linear layer.

    AYT's is VGG16 with BatchNorm. Without norms the net is a function of its parameters alone.
    """

    labels: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Images) -> tuple[Float[Array, "batch labels"], Maps]:
        """The logits, and each stage's map behind its pool, at strides 2, 4, 8, ... ValueError for images too small for it."""
        if min(images.shape[1:3]) < 2 ** len(self.widths):
            raise ValueError(
                f"found images {images.shape}, expected sides of at least {2 ** len(self.widths)} for {len(self.widths)} stages; "
                "use fewer widths"
            )
        x, maps = images, []
        for stage, width in enumerate(self.widths, start=1):
            for index in (1, 2):
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=f"conv{stage}_{index}")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            maps.append(x)
        return nn.Dense(self.labels, name="head")(reduce(x, "b h w c -> b c", "mean")), maps


def feature_distance(
    net: Callable[[Images], tuple[Array, Maps]], a: Images, b: Images, *, smooth: float = 1e-5
) -> Float[Array, "batch"]:
    """AYT's manifold feature distance, as in the authors' code: sqrt(|x - y|^2 + smooth^2) - smooth, |.| the norm of ONE
    feature over positions, summed over the features of all maps and the logits.

    `net` has its parameters bound; `smooth` keeps the gradient finite where a = b.
    """
    total = jnp.zeros(a.shape[0])
    (logits_a, maps_a), (logits_b, maps_b) = net(a), net(b)
    for x, y in zip([*maps_a, _map(logits_a)], [*maps_b, _map(logits_b)], strict=True):
        squares = reduce(jnp.square(x - y), "b h w c -> b c", "sum")
        total += jnp.sum(jnp.sqrt(squares + smooth**2) - smooth, axis=-1)
    return total


def _map(logits):
    return rearrange(logits, "b c -> b 1 1 c")
