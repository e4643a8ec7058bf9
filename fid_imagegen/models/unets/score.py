"""DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456, Sec. 4 and App. H) as EDM configures them (Karras et al. 2022,
arXiv 2206.00364, App. F): one U-Net in two settings.

DDPM++ halves and doubles by means and repeats and encodes the level by sin-cos; NCSN++ filters with [1, 3, 3, 1], encodes it
by random Fourier features and adds the ever smaller input to the encoder.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fid_imagegen.models.layers import XAVIER
from fid_imagegen.models.unets.layers import (
    IMAGE,
    RESAMPLINGS,
    ZEROS,
    Image,
    SelfAttention,
    check_input,
    conv,
    fir_blur,
    fourier_frequencies,
    group_norm,
    level_features,
    sin_cos_frequencies,
)

EPSILON = 1e-6
ATTENTION_INIT = nn.initializers.variance_scaling(0.1, "fan_avg", "uniform")


def _groups(features: int) -> int:
    """32 groups, or fewer of four channels each."""
    return min(32, features // 4)


class ScoreBlock(nn.Module):
    """(x + conv(SiLU(norm(conv(SiLU(norm(x))) + condition)))) / sqrt(2), then attention where wanted, scaled likewise.

    The second convolution and attention's output start at zero. resample: None, "up" or "down", before the first one.
    """

    features: int
    resample: str | None
    attention: bool
    resampling: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Image, condition: Float[Array, "batch features"], deterministic: bool) -> Image:
        def norm(name, x):
            return nn.silu(group_norm(_groups(x.shape[-1]), EPSILON, self.dtype, name)(x))

        resample = RESAMPLINGS[self.resampling][self.resample]
        h = conv(self.features, 3, self.dtype, "conv1", XAVIER)(resample(norm("norm1", x)))
        h = h + nn.Dense(self.features, kernel_init=XAVIER, dtype=self.dtype, name="level")(condition)[:, None, None]
        h = nn.Dropout(self.dropout)(norm("norm2", h), deterministic)
        h = conv(self.features, 3, self.dtype, "conv2", ZEROS)(h)
        if x.shape[-1] != self.features or self.resample:
            x = conv(self.features, 1, self.dtype, "conv_shortcut", XAVIER)(resample(x))
        x = (x + h) / math.sqrt(2)
        if self.attention:
            attend = SelfAttention(1, _groups(self.features), EPSILON, ATTENTION_INIT, self.dtype, name="attention")
            x = (x + attend(x)) / math.sqrt(2)
        return nn.with_logical_constraint(x, IMAGE)


class ScoreUNet(nn.Module):
    """Noisy images scaled by c_in, [batch, height, width, channels], and levels -> raw output of the same shape, float32.

    stem: width of the first convolution and, four times, of the condition. widths: of each resolution, the finest first.
    blocks: of a resolution in the encoder; the decoder has one more. attention_levels: resolutions with attention, by number.
    fourier_scale: of random Fourier features (16 as published; 0.02 for objectives that differentiate in the level), or None
    for sin-cos of level_scale * level. progressive_input: the shrinking input is added to the encoder at each resolution.
    """

    channels: int
    stem: int
    widths: tuple[int, ...]
    blocks: int
    attention_levels: tuple[int, ...]
    resampling: str
    progressive_input: bool
    fourier_scale: float | None
    level_scale: float = 1.0
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
        condition = self._condition(levels_BK, label_B)
        remat_block = nn.remat(ScoreBlock, static_argnums=(3,)) if self.remat else ScoreBlock

        def block(name, x, features, *, resample=None, attention=False):
            made = remat_block(features, resample, attention, self.resampling, self.dropout, self.dtype, name=name)
            return made(x, condition, deterministic)

        pyramid = x.astype(self.dtype)
        x = conv(self.stem, 3, self.dtype, "conv_in", XAVIER)(x)
        skips = [x]
        for level, width in enumerate(self.widths):
            if level:
                x = block(f"down_{level}_resample", x, x.shape[-1], resample="down")
                if self.progressive_input:
                    pyramid = x = (x + self._shrink(pyramid, x.shape[-1], f"pyramid_{level}")) / math.sqrt(2)
                skips.append(x)
            for i in range(self.blocks):
                x = block(f"down_{level}_{i}", x, width, attention=level in self.attention_levels)
                skips.append(x)
        x = block("mid_0", x, x.shape[-1], attention=True)
        x = block("mid_1", x, x.shape[-1])
        for level, width in reversed(list(enumerate(self.widths))):
            if level < len(self.widths) - 1:
                x = block(f"up_{level}_resample", x, x.shape[-1], resample="up")
            for i in range(self.blocks + 1):
                attention = level in self.attention_levels and i == self.blocks
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(f"up_{level}_{i}", x, width, attention=attention)
        x = nn.silu(group_norm(_groups(x.shape[-1]), EPSILON, self.dtype, "norm_out")(x))
        x = conv(self.channels, 3, self.dtype, "conv_out", ZEROS)(x)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _condition(self, levels_BK, label_B) -> Float[Array, "batch features"]:
        if self.fourier_scale is None:
            x = level_features(self.level_scale * levels_BK, sin_cos_frequencies(self.stem // 2, endpoint=True))
        else:
            x = level_features(levels_BK, fourier_frequencies(self.stem, self.fourier_scale))
        x = x.astype(self.dtype)
        if self.num_classes:
            one_hot = math.sqrt(self.num_classes) * jax.nn.one_hot(label_B, self.num_classes, dtype=self.dtype)
            x = x + nn.Dense(x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name="label")(one_hot)
        for name in ("level_0", "level_1"):
            x = nn.silu(nn.Dense(4 * self.stem, kernel_init=XAVIER, dtype=self.dtype, name=name)(x))
        return x

    def _shrink(self, x: Image, features: int, name: str) -> Image:
        halve = nn.Conv(features, (3, 3), 2, padding="VALID", kernel_init=XAVIER, dtype=self.dtype, name=name)
        return halve(fir_blur(x))
