"""Stage C of Würstchen: text -> latents of the semantic compressor, as a denoiser of constant resolution."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fid_imagegen.models.wuerstchen.blocks import (
    LEVEL_SCALE,
    Image,
    KeysValues,
    check_channels,
    layer_norm,
    level_embedding,
    normal_init,
    stack_blocks,
    wide,
)

# The released weights. The paper's App. E.3 (16 blocks of 1280, 347 M) is not what it counts as 0.99 B.
PUBLIC_STAGE_C = {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24, "dropout": 0.1}


class StageC(nn.Module):
    """WuerstchenPrior: `depth` equal blocks of width `c` under one scan; fields are named as in diffusers' config.

    `c_in` channels of latents, `c_cond` of text tokens, `c_r` of the level's embedding. No position is embedded: any height and
    width will do. A text's padding is attended to as well, as in the public model.
    """

    c_in: int
    c: int
    c_cond: int
    c_r: int
    depth: int
    nhead: int
    dropout: float
    level_scale: float = LEVEL_SCALE
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        dense = lambda: nn.Dense(self.c, kernel_init=normal_init, dtype=self.dtype)  # noqa: E731
        self.projection, self.cond_in, self.cond_out = dense(), dense(), dense()
        self.blocks = stack_blocks(
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
            features=self.c,
            heads=self.nhead,
            text=True,
            kernel=3,
            dropout=self.dropout,
            gain=math.sqrt(1 / self.depth),
            dtype=self.dtype,
        )
        self.out = nn.Dense(2 * self.c_in, kernel_init=nn.initializers.zeros, dtype=wide(self.dtype))

    def condition(self, text_BTD: Float[Array, "batch tokens c_cond"]) -> KeysValues:
        """All that does not depend on the noise level: each block's keys and values of the text, [L, batch, tokens, ...]."""
        check_channels("text", text_BTD, self.c_cond)
        mapped = self.cond_out(nn.leaky_relu(self.cond_in(text_BTD), 0.2))
        return self.blocks.condition(None, mapped)[1]

    def __call__(
        self, x_BHWC: Image, r_B: Float[Array, "batch"], cond: KeysValues, deterministic: bool = True
    ) -> tuple[Image, Image]:
        """(a, b) in float32, each in the latents' shape, at noise times `r_B` in [0, 1]; both are zero at initialisation.

        The published noise estimate is (x - a) / (|1 - b| + 1e-5).
        """
        check_channels("latents", x_BHWC, self.c_in)
        embedding = level_embedding(r_B, self.c_r, self.level_scale)
        h, _ = self.blocks(self.projection(x_BHWC), embedding, None, cond, deterministic)
        return tuple(jnp.split(self.out(layer_norm(h.astype(wide(self.dtype)))), 2, axis=-1))

    def end_to_end(
        self,
        x_BHWC: Image,
        r_B: Float[Array, "batch"],
        text_BTD: Float[Array, "batch tokens c_cond"],
        deterministic: bool = True,
    ) -> tuple[Image, Image]:
        """`condition` and `__call__` in one: what initialisation and training call."""
        return self(x_BHWC, r_B, self.condition(text_BTD), deterministic)
