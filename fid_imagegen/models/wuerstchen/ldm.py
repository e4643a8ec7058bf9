"""The baseline of Würstchen's App. E.4: one text-conditional U-Net on the f8 latents of `models.autoencoder_kl`.

Stated there: widths, heads, blocks a level (2, 4, 14, 4 down and 5, 15, 5, 3 up), a ConvNeXt block with global response norm
followed by cross-attention to time and to text, 768 wide, and 0.99 B parameters. What it leaves open is chosen here so that
the count is met: each decoder block takes one of the encoder's outputs, added through a depthwise convolution, and both
contexts are as wide as the text.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fid_imagegen.models.layers import XAVIER
from fid_imagegen.models.wuerstchen.blocks import (
    HEADS,
    IMAGE,
    ConvBlock,
    Image,
    KeysValues,
    check_channels,
    layer_norm,
    level_embedding,
    wide,
    xavier_init,
)
from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv
from fid_imagegen.models.wuerstchen.stage_b import Upsample

PAPER_BASELINE = {
    "channels": 4,
    "widths": (320, 640, 1280, 1280),
    "heads": (5, 10, 20, 20),
    "blocks": (2, 4, 14, 4),
    "text_width": 768,
    "level_width": 64,
    "dropout": 0.1,
}
TIME_TOKENS = 4  # attention to a single token would be the same for every pixel

Tokens = Float[Array, "batch tokens width"]


class CrossAttention(nn.Module):
    """x + attention of the normed image to the tokens of a context."""

    features: int
    heads: int
    dropout: float
    dtype: Any = jnp.float32

    def setup(self):
        self.query, self.key, self.value, self.out = (
            nn.Dense(self.features, kernel_init=XAVIER, dtype=self.dtype) for _ in range(4)
        )
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: Image, context: KeysValues, deterministic: bool) -> Image:
        queries = self._split(self.query(rearrange(layer_norm(x), "b h w c -> b (h w) c")))
        out = rearrange(jax.nn.dot_product_attention(queries, *context), "b n h d -> b n (h d)")
        return nn.with_logical_constraint(x + self.drop(self.out(out), deterministic).reshape(x.shape), IMAGE)

    def keys_values(self, tokens: Tokens) -> KeysValues:
        """What `__call__` needs of the context."""
        return self._split(self.key(tokens)), self._split(self.value(tokens))

    def _split(self, x):
        return nn.with_logical_constraint(rearrange(x, "b n (h d) -> b n h d", h=self.heads), HEADS)


class BaselineBlock(nn.Module):
    """A decoder's skip, ConvNeXt block, attention to time, attention to text."""

    features: int
    heads: int
    skip: bool
    dropout: float
    gain: float
    dtype: Any = jnp.float32

    def setup(self):
        if self.skip:
            self.skip_conv = DepthwiseConv(dtype=self.dtype)
        self.residual = ConvBlock(3, self.dropout, self.gain, self.dtype)
        self.time, self.text = (CrossAttention(self.features, self.heads, self.dropout, self.dtype) for _ in range(2))

    def __call__(
        self, x: Image, time: Tokens, skip: Image | None, text: KeysValues, deterministic: bool
    ) -> tuple[Image, Image]:
        if self.skip:
            x = x + self.skip_conv(skip)
        x = self.time(self.residual(x, None, deterministic), self.time.keys_values(time), deterministic)
        x = self.text(x, text, deterministic)
        return x, x

    def condition(self, carry: None, text: Tokens) -> tuple[None, KeysValues]:
        """(carry, the keys and values of the text): a scan's form."""
        return carry, self.text.keys_values(text)


class LatentUNet(nn.Module):
    """`blocks[i]` encoder blocks and one more decoder block of width `widths[i]` at the i-th resolution, the finest first.

    The blocks of a resolution are scanned, and so are the encoder's outputs that the decoder takes back one by one.
    """

    channels: int
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    blocks: tuple[int, ...]
    text_width: int
    level_width: int
    dropout: float
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    @property
    def step(self) -> int:
        """The latents' height and width are multiples of it."""
        return 2 ** (len(self.widths) - 1)

    def setup(self):
        if not len(self.widths) == len(self.heads) == len(self.blocks):
            raise ValueError(
                f"found widths, heads, blocks = {self.widths}, {self.heads}, {self.blocks}, expected one entry a resolution in "
                "each; change the configuration"
            )
        if any(width % heads for width, heads in zip(self.widths, self.heads, strict=True)):
            raise ValueError(
                f"found widths {self.widths} with {self.heads} heads, expected multiples; change widths or heads"
            )
        levels = range(len(self.widths))
        self.embedding = nn.Dense(self.widths[0], kernel_init=xavier_init(0.02), dtype=self.dtype)
        self.time_mapper = nn.Dense(TIME_TOKENS * self.text_width, kernel_init=XAVIER)
        self.down = [self._stack(i, decoder=False) for i in levels]
        self.up = [self._stack(i, decoder=True) for i in reversed(levels)]
        self.downsample = [
            nn.Conv(width, (2, 2), (2, 2), padding="VALID", kernel_init=XAVIER, dtype=self.dtype)
            for width in self.widths[1:]
        ]
        self.upsample = [Upsample(width, self.dtype) for width in reversed(self.widths[:-1])]
        self.out = nn.Dense(2 * self.channels, kernel_init=nn.initializers.zeros, dtype=wide(self.dtype))

    def _stack(self, i: int, *, decoder: bool) -> BaselineBlock:
        layers = self.blocks[i] + decoder
        scan = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "length": layers,
            "unroll": layers if self.unroll else 1,
        }
        every = nn.broadcast
        skips = 0 if decoder else every
        methods = {"__call__": scan | {"in_axes": (every, skips, 0, every)}, "condition": scan | {"in_axes": (every,)}}
        block = nn.remat(BaselineBlock, prevent_cse=False, static_argnums=(5,)) if self.remat else BaselineBlock
        gain = math.sqrt(1 / sum(2 * count + 1 for count in self.blocks))
        return nn.scan(block, methods=methods)(self.widths[i], self.heads[i], decoder, self.dropout, gain, self.dtype)

    def condition(self, text_BTD: Float[Array, "batch tokens text_width"]) -> dict[str, list[KeysValues]]:
        """All that does not depend on the noise level: each block's keys and values of the text."""
        check_channels("text", text_BTD, self.text_width)
        return {
            way: [level.condition(None, text_BTD)[1] for level in levels]
            for way, levels in {"down": self.down, "up": self.up}.items()
        }

    def __call__(
        self, x_BHWC: Image, r_B: Float[Array, "batch"], cond: dict, deterministic: bool = True
    ) -> tuple[Image, Image]:
        """(a, b) in float32, each in the latents' shape, at noise times `r_B` in [0, 1]; both are zero at initialisation."""
        check_channels("latents", x_BHWC, self.channels)
        self._check_size(x_BHWC.shape[1:3])
        time = self.time_mapper(level_embedding(r_B, self.level_width)).astype(self.dtype)
        time = rearrange(time, "b (n d) -> b n d", n=TIME_TOKENS)
        h = layer_norm(self.embedding(x_BHWC))
        encoded = []
        for i, level in enumerate(self.down):
            entry = self.downsample[i - 1](layer_norm(h)) if i else h
            h, outputs = level(entry, time, None, cond["down"][i], deterministic)
            encoded.append(jnp.concatenate([entry[None], outputs]))
        for i, level in enumerate(self.up):
            h = self.upsample[i - 1](layer_norm(h)) if i else h
            h, _ = level(h, time, encoded[-1 - i][::-1], cond["up"][i], deterministic)
        return tuple(jnp.split(self.out(layer_norm(h.astype(wide(self.dtype)))), 2, axis=-1))

    def end_to_end(
        self,
        x_BHWC: Image,
        r_B: Float[Array, "batch"],
        text_BTD: Float[Array, "batch tokens text_width"],
        deterministic: bool = True,
    ) -> tuple[Image, Image]:
        """`condition` and `__call__` in one: what initialisation and training call."""
        return self(x_BHWC, r_B, self.condition(text_BTD), deterministic)

    def _check_size(self, latent_hw: tuple[int, int]):
        if latent_hw[0] % self.step or latent_hw[1] % self.step:
            raise ValueError(
                f"found latents of {latent_hw[0]}x{latent_hw[1]}, expected multiples of {self.step}; pad them, and crop the image"
            )
