"""The first stage of latent diffusion: an autoencoder with Gaussian latents (Rombach et al. 2022, arXiv 2112.10752).

The architecture of diffusers' AutoencoderKL; modules carry its names, so that public weights are read one to one.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from fid_imagegen.models.layers import XAVIER

# Stable Diffusion 1 and 2: f8, 83,653,863 parameters. It scales latents by 0.18215; a task does that, not the model.
STABLE_DIFFUSION = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
LOG_VARIANCE_RANGE = (-30.0, 20.0)

Images = Float[Array, "batch height width channels"]


def _norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    # The quick variance, mean of squares minus squared mean, loses digits that parity needs.
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(features: int, kernel: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), padding=kernel // 2, kernel_init=XAVIER, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x mapped by a 1x1 convolution where the width changes."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        h = _conv(self.features, 3, self.dtype, "conv1")(nn.silu(_norm(self.groups, self.dtype, "norm1")(x)))
        h = _conv(self.features, 3, self.dtype, "conv2")(nn.silu(_norm(self.groups, self.dtype, "norm2")(h)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return nn.with_logical_constraint(x + h, ("batch", None, None, "features"))


class SelfAttention(nn.Module):
    """x + single-head attention of the normed positions to each other."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        dense = lambda name: nn.Dense(x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name=name)  # noqa: E731
        h = rearrange(_norm(self.groups, self.dtype, "group_norm")(x), "b h w c -> b (h w) 1 c")
        h = nn.dot_product_attention(
            *(dense(name)(h) for name in ("to_q", "to_k", "to_v")), force_fp32_for_softmax=True
        )
        return x + dense("to_out_0")(h).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        x = ResidualBlock(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        x = SelfAttention(self.groups, self.dtype, name="attentions_0")(x)
        return ResidualBlock(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded below and to the right only."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return nn.Conv(x.shape[-1], (3, 3), 2, padding="VALID", kernel_init=XAVIER, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        return _conv(x.shape[-1], 3, self.dtype, "conv")(repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2))


class Resolution(nn.Module):
    """The residual blocks of one resolution and, but for the last one, the change to the next."""

    features: int
    layers: int
    resample: str | None  # downsamplers or upsamplers
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        for i in range(self.layers):
            x = ResidualBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample:
            resample = {"downsamplers": Downsample, "upsamplers": Upsample}[self.resample]
            x = resample(self.dtype, name=f"{self.resample}_0")(x)
        return x


class Encoder(nn.Module):
    """Images to `out` channels at the coarsest resolution."""

    out: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        x = _conv(self.widths[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            resample = "downsamplers" if i < len(self.widths) - 1 else None
            x = Resolution(width, self.layers, resample, self.groups, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.groups, self.dtype, name="mid_block")(x)
        return _conv(self.out, 3, self.dtype, "conv_out")(nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x)))


class Decoder(nn.Module):
    """Latents to `out` channels at the finest resolution."""

    out: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        x = _conv(self.widths[-1], 3, self.dtype, "conv_in")(x)
        x = MidBlock(self.groups, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(self.widths)):
            resample = "upsamplers" if i < len(self.widths) - 1 else None
            x = Resolution(width, self.layers + 1, resample, self.groups, self.dtype, name=f"up_blocks_{i}")(x)
        return _conv(self.out, 3, self.dtype, "conv_out")(nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x)))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> latents 2^(levels - 1) times smaller; fields are named as in diffusers' config.

    Its blocks differ in width and in their resampling, so they are not stacked.
    """

    in_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    dtype: Any = jnp.float32

    def setup(self):
        shared = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.dtype)
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.in_channels, *shared)
        self.quant_conv = _conv(2 * self.latent_channels, 1, self.dtype, None)
        self.post_quant_conv = _conv(self.latent_channels, 1, self.dtype, None)

    def encode(self, images_BHWC: Images) -> tuple[Images, Images]:
        """(mean, log variance) of the latents, float32; a sample is mean + exp(log variance / 2) times standard noise."""
        step = 2 ** (len(self.block_out_channels) - 1)
        if images_BHWC.shape[1] % step or images_BHWC.shape[2] % step:
            raise ValueError(
                f"found images of {images_BHWC.shape[1]}x{images_BHWC.shape[2]}, expected multiples of {step}; pad or crop them"
            )
        moments = self.quant_conv(self.encoder(images_BHWC)).astype(jnp.promote_types(self.dtype, jnp.float32))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, latents_BHWC: Images) -> Images:
        """Images, about [-1, 1] and not clipped, float32."""
        images = self.decoder(self.post_quant_conv(latents_BHWC))
        return images.astype(jnp.promote_types(self.dtype, jnp.float32))

    def __call__(self, images_BHWC: Images) -> Images:
        """Images by way of the mean of their latents."""
        return self.decode(self.encode(images_BHWC)[0])
