"""Stage C as a Transformer: the comparison that Würstchen's reviewers asked for, behind Stage C's interface.

DiT (Peebles & Xie 2023, arXiv 2212.09748) with cross-attention to the text between attention and MLP as in PixArt (Chen et
al. 2024, arXiv 2310.00426), normalised queries and keys (Dehghani et al. 2023, arXiv 2302.05442) and rotary positions (Su et
al. 2021, arXiv 2104.09864) over rows and columns, so that any height and width will do. Rotations say where tokens stand to
each other only: fixed positions, as DiT's, say where in the picture ("at the top"), which Stage C's padding tells a ConvNet.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fid_imagegen.models.layers import TOKENS, XAVIER, FeedForward, LevelEmbedding, rms_norm, sin_cos_positions
from fid_imagegen.models.rotary import Rotation, rotary_angles, rotate
from fid_imagegen.models.wuerstchen.blocks import (
    HEADS,
    Image,
    KeysValues,
    check_channels,
    layer_norm,
    normal_init,
    wide,
)

# As many parameters as the public Stage C, within 1 %; fewer layers, because adaLN's modulations are parameters too.
EQUAL_TO_STAGE_C = {"channels": 16, "width": 1536, "text_width": 1280, "depth": 19, "heads": 24, "dropout": 0.1}

Tokens = Float[Array, "batch tokens features"]


class TransformerBlock(nn.Module):
    """Attention to the image, to the text, and an MLP; the first and the last modulated and gated by the noise level.

    The identity at initialisation: the gates and the text branch's last layer start at zero. Queries and keys are normed in
    every head, so that attention's logits cannot grow with the weights.
    """

    width: int
    heads: int
    dropout: float
    dtype: Any = jnp.float32

    def setup(self):
        zeros = nn.initializers.zeros
        dense = lambda init=XAVIER: nn.Dense(self.width, kernel_init=init, dtype=self.dtype)  # noqa: E731
        self.query, self.key, self.value, self.out = (dense() for _ in range(4))
        self.text_query, self.text_key, self.text_value, self.text_out = dense(), dense(), dense(), dense(zeros)
        self.query_norm, self.key_norm, self.text_query_norm, self.text_key_norm = (
            rms_norm(affine=True, dtype=self.dtype) for _ in range(4)
        )
        self.modulation = nn.Dense(6 * self.width, kernel_init=zeros, dtype=self.dtype)
        self.mlp = FeedForward(self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        x: Tokens,
        level_BD: Float[Array, "batch features"],
        angles: Rotation,
        text: KeysValues,
        deterministic: bool,
    ) -> tuple[Tokens, None]:
        modulation = self.modulation(nn.silu(level_BD))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        h = layer_norm(x) * (1 + scale_a) + shift_a
        queries, keys = self.query_norm(self._split(self.query(h))), self.key_norm(self._split(self.key(h)))
        h = self._attend(rotate(queries, angles), rotate(keys, angles), self._split(self.value(h)))
        x = x + gate_a * self.drop(self.out(h), deterministic)
        queries = self.text_query_norm(self._split(self.text_query(layer_norm(x))))
        x = x + self.drop(self.text_out(self._attend(queries, *text)), deterministic)
        h = self.mlp(layer_norm(x) * (1 + scale_m) + shift_m)
        x = x + gate_m * self.drop(h, deterministic)
        return nn.with_logical_constraint(x, TOKENS), None

    def condition(self, carry: None, text: Tokens) -> tuple[None, KeysValues]:
        """(carry, the keys and values of the text): a scan's form."""
        return carry, (self.text_key_norm(self._split(self.text_key(text))), self._split(self.text_value(text)))

    def _split(self, x):
        return nn.with_logical_constraint(rearrange(x, "b n (h d) -> b n h d", h=self.heads), HEADS)

    def _attend(self, queries, keys, values):
        return rearrange(jax.nn.dot_product_attention(queries, keys, values), "b n h d -> b n (h d)")


class StageCTransformer(nn.Module):
    """`depth` Transformer blocks of width `width` under one scan; one token a latent position.

    `channels` of the latents, `text_width` of the text's tokens.
    """

    channels: int
    width: int
    text_width: int
    depth: int
    heads: int
    dropout: float
    level_scale: float = 1000.0
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        if self.width % self.heads:
            raise ValueError(
                f"found width {self.width} with {self.heads} heads, expected a multiple; change width or heads"
            )
        dense = lambda: nn.Dense(self.width, kernel_init=normal_init, dtype=self.dtype)  # noqa: E731
        # As large as the positions that are added to it.
        self.projection = nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype)
        self.text_in, self.text_out = dense(), dense()
        self.level = LevelEmbedding(self.width, self.level_scale, dtype=self.dtype)
        block = nn.remat(TransformerBlock, prevent_cse=False, static_argnums=(5,)) if self.remat else TransformerBlock
        scan = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "length": self.depth,
            "unroll": self.depth if self.unroll else 1,
        }
        every = nn.broadcast
        methods = {"__call__": scan | {"in_axes": (every, every, 0, every)}, "condition": scan | {"in_axes": (every,)}}
        self.blocks = nn.scan(block, methods=methods)(self.width, self.heads, self.dropout, self.dtype)
        zeros = nn.initializers.zeros
        self.modulation = nn.Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype)
        self.out = nn.Dense(2 * self.channels, kernel_init=zeros, dtype=wide(self.dtype))

    def condition(self, text_BTD: Float[Array, "batch tokens text_width"]) -> KeysValues:
        """All that does not depend on the noise level: each block's keys and values of the text, [L, batch, tokens, ...]."""
        check_channels("text", text_BTD, self.text_width)
        return self.blocks.condition(None, self.text_out(nn.leaky_relu(self.text_in(text_BTD), 0.2)))[1]

    def __call__(
        self, x_BHWC: Image, r_B: Float[Array, "batch"], cond: KeysValues, deterministic: bool = True
    ) -> tuple[Image, Image]:
        """(a, b) in float32, each in the latents' shape, at noise times `r_B` in [0, 1]; both are zero at initialisation."""
        check_channels("latents", x_BHWC, self.channels)
        height, width = x_BHWC.shape[1:3]
        level = self.level(r_B[:, None])
        h = self.projection(rearrange(x_BHWC, "b h w c -> b (h w) c"))
        h = h + sin_cos_positions(height, width, self.width).astype(self.dtype)
        angles = rotary_angles(height, width, self.width // self.heads)
        h, _ = self.blocks(h, level, angles, cond, deterministic)
        shift, scale = jnp.split(self.modulation(nn.silu(level))[:, None], 2, axis=-1)
        h = self.out(layer_norm(h.astype(wide(self.dtype))) * (1 + scale) + shift)
        return tuple(jnp.split(rearrange(h, "b (h w) c -> b h w c", h=height), 2, axis=-1))

    def end_to_end(
        self,
        x_BHWC: Image,
        r_B: Float[Array, "batch"],
        text_BTD: Float[Array, "batch tokens text_width"],
        deterministic: bool = True,
    ) -> tuple[Image, Image]:
        """`condition` and `__call__` in one: what initialisation and training call."""
        return self(x_BHWC, r_B, self.condition(text_BTD), deterministic)
