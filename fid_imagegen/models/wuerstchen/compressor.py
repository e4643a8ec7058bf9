"""The semantic compressor: what Stage C generates and Stage B is conditioned on (Würstchen, arXiv 2306.00637, Sec. 3).

A compressor is a module with `stride`, `channels` and __call__(images in [0, 1], train) -> float32 latents
[batch, ceil(height / stride), ceil(width / stride), channels]. It ends in a BatchNorm: channels have about zero mean and
unit variance, up to its learned affine map.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fid_imagegen.models.wuerstchen.efficientnet import ConvNorm, EfficientNetV2Features, Spec

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of images in [0, 1]
STD = (0.229, 0.224, 0.225)
PUBLISHED = {"mean": -1.0, "deviation": 42.0}  # of the public weights' latents: Stage C sees (latent + 1) / 42


class LatentHead(nn.Module):
    """Features to latents: a 1x1 convolution without bias, and BatchNorm in float32."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features_BHWC: Float[Array, "batch rows columns features"], train: bool
    ) -> Float[Array, "batch rows columns channels"]:
        x = nn.Conv(self.channels, (1, 1), use_bias=False, dtype=self.dtype, name="conv")(features_BHWC)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm")(x.astype(jnp.float32))


class EfficientNetCompressor(nn.Module):
    """The published compressor: EfficientNetV2's features, normalised for it, and the head. `train` is the backbone's too."""

    variant: str | Spec = "s"
    channels: int = 16
    drop_rate: float = 0.2
    dtype: Any = jnp.float32
    stride = 32

    @nn.compact
    def __call__(
        self, images_BHWC: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch rows columns channels"]:
        x = (images_BHWC - jnp.asarray(MEAN)) / jnp.asarray(STD)
        x = EfficientNetV2Features(self.variant, self.drop_rate, self.dtype, name="backbone")(x, train)
        return LatentHead(self.channels, self.dtype, name="mapper")(x, train)


class ConvCompressor(nn.Module):
    """A small encoder without pre-training: for each width a strided convolution and a residual one, then the head."""

    stride: int
    widths: tuple[int, ...]  # one for each halving
    channels: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images_BHWC: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch rows columns channels"]:
        if self.stride != 2 ** len(self.widths):
            raise ValueError(
                f"found {len(self.widths)} widths for stride {self.stride}, expected one for each halving; "
                f"give {math.log2(self.stride):g} widths or stride {2 ** len(self.widths)}"
            )
        x = (2 * images_BHWC - 1).astype(self.dtype)
        for level, width in enumerate(self.widths):
            x = ConvNorm(width, 3, 2, dtype=self.dtype, name=f"halve_{level}")(x, train)
            x = x + ConvNorm(width, 3, dtype=self.dtype, name=f"mix_{level}")(x, train)
        return LatentHead(self.channels, self.dtype, name="mapper")(x, train)


COMPRESSORS = {
    "efficientnet_v2_s": partial(EfficientNetCompressor, "s"),
    "efficientnet_v2_l": partial(EfficientNetCompressor, "l"),
    "conv": ConvCompressor,
}


def build_compressor(name: str, **fields) -> nn.Module:
    """The compressor of that name in COMPRESSORS; ValueError lists the known ones."""
    if name not in COMPRESSORS:
        raise ValueError(f"found compressor {name!r}, expected one of {sorted(COMPRESSORS)}")
    return COMPRESSORS[name](**fields)
