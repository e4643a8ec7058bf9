"""EfficientNetV2 (Tan & Le 2021, arXiv 2104.00298, Table 4) up to its last feature map, as torchvision builds it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv

FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
MAP = ("batch", None, None, "features")


class Stage(NamedTuple):
    """`layers` equal blocks; the first has the stride and changes the width. Fused: one 3x3 convolution does the work of two."""

    fused: bool
    ratio: int  # of a block's hidden to its incoming channels
    width: int
    layers: int
    stride: int


class Spec(NamedTuple):
    """Channels after the first convolution, stages, channels of the features."""

    stem: int
    stages: tuple[Stage, ...]
    head: int


SPECS = {
    "s": Spec(
        stem=24,
        stages=(
            Stage(True, 1, 24, 2, 1),
            Stage(True, 4, 48, 4, 2),
            Stage(True, 4, 64, 4, 2),
            Stage(False, 4, 128, 6, 2),
            Stage(False, 6, 160, 9, 1),
            Stage(False, 6, 256, 15, 2),
        ),
        head=1280,
    ),
    "l": Spec(
        stem=32,
        stages=(
            Stage(True, 1, 32, 4, 1),
            Stage(True, 4, 64, 7, 2),
            Stage(True, 4, 96, 7, 2),
            Stage(False, 4, 192, 10, 2),
            Stage(False, 6, 224, 19, 1),
            Stage(False, 6, 384, 25, 2),
            Stage(False, 6, 640, 7, 1),
        ),
        head=1280,
    ),
}


def resolve_spec(variant: str | Spec) -> Spec:
    """The public spec of that name, or the spec itself."""
    if isinstance(variant, Spec):
        return variant
    if variant not in SPECS:
        raise ValueError(f"found EfficientNetV2 variant {variant!r}, expected one of {sorted(SPECS)} or a Spec")
    return SPECS[variant]


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm and, but for `silu=False`, SiLU."""

    features: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    silu: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns features"]:
        fields = {"use_bias": False, "kernel_init": FAN_OUT, "dtype": self.dtype, "name": "conv"}
        if self.depthwise:
            x = DepthwiseConv(self.kernel, self.stride, **fields)(x)
        else:
            kernel, border = (self.kernel, self.kernel), self.kernel // 2
            x = nn.Conv(self.features, kernel, self.stride, padding=border, **fields)(x)
        x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, dtype=self.dtype, name="norm")(x)
        return nn.with_logical_constraint(nn.silu(x) if self.silu else x, MAP)


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate that sees their means (Hu et al. 2018, arXiv 1709.01507)."""

    squeezed: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        fields = {"kernel_size": (1, 1), "kernel_init": FAN_OUT, "dtype": self.dtype}
        gate = nn.Conv(self.squeezed, name="fc1", **fields)(reduce(x, "b h w c -> b 1 1 c", "mean"))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], name="fc2", **fields)(nn.silu(gate)))


class Block(nn.Module):
    """MBConv or FusedMBConv; where the shape stays, a residual that training drops from an image at `drop_rate`."""

    fused: bool
    ratio: int
    width: int
    stride: int
    drop_rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns features"]:
        channels, hidden = x.shape[-1], x.shape[-1] * self.ratio
        project = ConvNorm(self.width, 1, silu=False, dtype=self.dtype, name="project")
        if self.fused and self.ratio == 1:
            h = ConvNorm(self.width, 3, self.stride, dtype=self.dtype, name="expand")(x, train)
        elif self.fused:
            h = ConvNorm(hidden, 3, self.stride, dtype=self.dtype, name="expand")(x, train)
            h = project(h, train)
        else:
            h = ConvNorm(hidden, 1, dtype=self.dtype, name="expand")(x, train)
            h = ConvNorm(hidden, 3, self.stride, depthwise=True, dtype=self.dtype, name="depthwise")(h, train)
            h = SqueezeExcitation(max(1, channels // 4), dtype=self.dtype, name="excite")(h)
            h = project(h, train)
        if self.stride > 1 or channels != self.width:
            return h
        return x + nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3))(h, deterministic=not train)


class EfficientNetV2Features(nn.Module):
    """Features at 1/32 (rounded up) of images under ImageNet's normalisation.

    With `train` BatchNorm takes the batch's statistics, and residuals are dropped with a rate that grows linearly over the
    blocks from 0 towards `drop_rate` (rng "dropout"). The running variance is the biased one, as Flax has it; PyTorch's is
    n / (n - 1) times larger.
    """

    variant: str | Spec = "s"
    drop_rate: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images_BHWC: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch rows columns features"]:
        spec = resolve_spec(self.variant)
        blocks, done = sum(stage.layers for stage in spec.stages), 0
        x = ConvNorm(spec.stem, 3, 2, dtype=self.dtype, name="stem")(images_BHWC.astype(self.dtype), train)
        for number, (fused, ratio, width, layers, stride) in enumerate(spec.stages, start=1):
            for layer in range(layers):
                rate, step = self.drop_rate * done / blocks, 1 if layer else stride
                x = Block(fused, ratio, width, step, rate, self.dtype, name=f"stage{number}_{layer}")(x, train)
                done += 1
        return ConvNorm(spec.head, 1, dtype=self.dtype, name="head")(x, train)
