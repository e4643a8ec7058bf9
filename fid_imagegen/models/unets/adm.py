"""ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, Sec. 3), the U-Net of the public consistency models (arXiv 2303.01469).

The architecture of diffusers' UNet2DModel with residual resampling and scale-shift norms; modules carry its names, so that
public weights are read one to one.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fid_imagegen.models.unets.layers import (
    IMAGE,
    RESAMPLINGS,
    ZEROS,
    Image,
    SelfAttention,
    check_input,
    conv,
    group_norm,
    level_features,
    sin_cos_frequencies,
)

EPSILON = 1e-5
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default, as in the release


class ADMBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))) * (1 + scale) + shift)), scale and shift from the condition.

    The second convolution starts at zero. resample: None, "up" or "down", before the first one and of x.
    """

    features: int
    resample: str | None
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Image, condition: Float[Array, "batch features"], deterministic: bool) -> Image:
        resample = RESAMPLINGS["box"][self.resample]
        h = resample(nn.silu(group_norm(self.groups, EPSILON, self.dtype, "norm1")(x)))
        h = conv(self.features, 3, self.dtype, "conv1", TORCH)(h)
        dense = nn.Dense(2 * self.features, kernel_init=TORCH, dtype=self.dtype, name="time_emb_proj")
        scale, shift = jnp.split(dense(nn.silu(condition))[:, None, None], 2, axis=-1)
        h = nn.silu(group_norm(self.groups, EPSILON, self.dtype, "norm2")(h) * (1 + scale) + shift)
        h = conv(self.features, 3, self.dtype, "conv2", ZEROS)(nn.Dropout(self.dropout)(h, deterministic))
        x = resample(x)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "conv_shortcut", TORCH)(x)
        return nn.with_logical_constraint(x + h, IMAGE)


class LevelEmbedding(nn.Module):
    """sin-cos of the scaled level, a quarter of `features` wide, then Dense, SiLU, Dense."""

    features: int
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, levels_BK: Float[Array, "batch K"]) -> Float[Array, "batch features"]:
        frequencies = sin_cos_frequencies(self.features // 8, endpoint=False)
        x = level_features(self.scale * levels_BK, frequencies).astype(self.dtype)
        x = nn.silu(nn.Dense(self.features, kernel_init=TORCH, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.features, kernel_init=TORCH, dtype=self.dtype, name="linear_2")(x)


class Stage(nn.Module):
    """The blocks of one resolution on the way down ("down"), in the middle (None) or up ("up"), and the change to the next.

    On the way down the outputs are appended to `skips`, on the way up each block takes the last of them.
    """

    features: int
    blocks: int
    attentions: int  # of the first so many blocks
    way: str | None
    resample: bool
    head_width: int
    groups: int
    dropout: float
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Image, skips: list[Image], condition: Float[Array, "batch features"], deterministic: bool
    ) -> Image:
        remat_block = nn.remat(ADMBlock, static_argnums=(3,)) if self.remat else ADMBlock

        def block(name, x, resample=None):
            made = remat_block(self.features, resample, self.groups, self.dropout, self.dtype, name=name)
            return made(x, condition, deterministic)

        for i in range(self.blocks):
            if self.way == "up":
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(f"resnets_{i}", x)
            if i < self.attentions:
                heads, left = divmod(self.features, self.head_width)
                if left or not heads:
                    raise ValueError(
                        f"found width {self.features} with heads {self.head_width} wide, expected a multiple; change "
                        "config.model.unet.head_width or the widths"
                    )
                x = x + SelfAttention(heads, self.groups, EPSILON, TORCH, self.dtype, name=f"attentions_{i}")(x)
            if self.way == "down":
                skips.append(x)
        if self.resample:
            x = block(f"{self.way}samplers_0", x, self.way)
            if self.way == "down":
                skips.append(x)
        return x


class ADM(nn.Module):
    """Noisy images scaled by c_in, [batch, height, width, channels], and levels -> raw output of the same shape, float32.

    widths: of each resolution, the finest first. blocks: of a resolution in the encoder; the decoder has one more.
    attention_levels: resolutions with attention, by number. head_width: channels of a head. groups: of every norm.
    """

    channels: int
    widths: tuple[int, ...]
    blocks: int
    attention_levels: tuple[int, ...]
    head_width: int
    groups: int
    level_scale: float = 1000.0
    num_classes: int = 0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Image,
        levels_BK: Float[Array, "batch K"],
        label_B: Int[Array, "batch"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Image:
        """Zero at initialisation. `label_B` is needed when `num_classes` > 0; the label `num_classes` is the null class."""
        check_input(x, label_B, levels=len(self.widths), num_classes=self.num_classes)
        embedded = 4 * self.widths[0]
        condition = LevelEmbedding(embedded, self.level_scale, self.dtype, name="time_embedding")(levels_BK)
        if self.num_classes:
            normal = nn.initializers.normal(1.0)
            embed = nn.Embed(self.num_classes, embedded, embedding_init=normal, name="class_embedding")
            # The public table has no row for the null class: it adds nothing.
            labelled = (label_B < self.num_classes)[:, None]
            condition = condition + jnp.where(labelled, embed(label_B % self.num_classes), 0).astype(self.dtype)
        last = len(self.widths) - 1

        def stage(name, x, level, *, blocks, attentions, way):
            resample = (way == "down" and level < last) or (way == "up" and level > 0)
            shared = (self.head_width, self.groups, self.dropout, self.remat, self.dtype)
            made = Stage(self.widths[level], blocks, attentions, way, resample, *shared, name=name)
            return made(x, skips, condition, deterministic)

        x = conv(self.widths[0], 3, self.dtype, "conv_in", TORCH)(x)
        skips = [x]
        for level in range(last + 1):
            attentions = self.blocks * (level in self.attention_levels)
            x = stage(f"down_blocks_{level}", x, level, blocks=self.blocks, attentions=attentions, way="down")
        x = stage("mid_block", x, last, blocks=2, attentions=1, way=None)
        for number, level in enumerate(reversed(range(last + 1))):
            blocks = self.blocks + 1
            attentions = blocks * (level in self.attention_levels)
            x = stage(f"up_blocks_{number}", x, level, blocks=blocks, attentions=attentions, way="up")
        x = nn.silu(group_norm(self.groups, EPSILON, self.dtype, "conv_norm_out")(x))
        x = conv(self.channels, 3, self.dtype, "conv_out", ZEROS)(x)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))
