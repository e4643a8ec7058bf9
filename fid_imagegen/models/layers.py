"""Layers the Transformers share: attention, adaLN-Zero and decoder blocks, and their embeddings.

DiT (Peebles & Xie 2023, arXiv 2212.09748) is the source of the adaLN-Zero block; TransINR (arXiv 2208.02801) and ANR
(arXiv 2407.15355) of the decoder block. Axes are named with `nn.with_logical_constraint`; `parallel` supplies the rules,
and without a mesh the names do nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

Dtype = Any
TOKENS = ("batch", "tokens", "features")
XAVIER = nn.initializers.xavier_uniform()


def layer_norm(name: str | None = None, *, affine: bool, dtype: Dtype) -> nn.LayerNorm:
    """Layer normalisation over features with DiT's epsilon; `affine=False` where a modulation follows."""
    return nn.LayerNorm(epsilon=1e-6, use_bias=affine, use_scale=affine, dtype=dtype, name=name)


def sin_cos_positions(height: int, width: int, features: int) -> np.ndarray:
    """Fixed 2-D sin-cos position embedding, float32 [height * width, features]; `features` must divide by 4.

    The first half of the features encodes the row, the second the column, each as [sin, cos] of position / 10000^(k/n).
    """
    if features % 4:
        raise ValueError(
            f"found {features} features, expected a multiple of 4 for 2-D sin-cos; change the model's width"
        )
    frequencies = 1.0 / 10000 ** (np.arange(features // 4, dtype=np.float64) / (features // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def encode(position):
        phases = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(phases), np.cos(phases)], axis=1)

    return np.concatenate([encode(rows), encode(columns)], axis=1).astype(np.float32)


class LevelEmbedding(nn.Module):
    """Noise level, or the two ends of a jump -> features: sin-cos of `scale * level` (period 10,000, 256 wide each), then Dense,
    SiLU, Dense.

    `scale` is 1000 as in the torch release of consistency models: c_noise = ln(sigma) / 4 spans only [-1.6, 1.1], and the
    embedder was made for 0..1000. Objectives that differentiate in the level need a small scale.
    """

    features: int
    scale: float = 1000.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, levels_BK: Float[Array, "batch K"]) -> Float[Array, "batch features"]:
        half = 128
        frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        phases = self.scale * levels_BK.astype(jnp.float32)[..., None] * frequencies
        x = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1).astype(self.dtype)
        x = rearrange(x, "b k f -> b (k f)")
        normal = nn.initializers.normal(0.02)
        x = nn.silu(nn.Dense(self.features, kernel_init=normal, dtype=self.dtype)(x))
        return nn.Dense(self.features, kernel_init=normal, dtype=self.dtype)(x)


class Attention(nn.Module):
    """Multi-head attention of `queries` over `context`, softmax in float32. Written as einsums so that a JVP exists."""

    heads: int
    use_bias: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Float[Array, "batch queries features"], context: Float[Array, "batch keys features"]
    ) -> Float[Array, "batch queries features"]:
        features = queries.shape[-1]
        if features % self.heads:
            raise ValueError(
                f"found width {features} with {self.heads} heads, expected a multiple; change width or heads"
            )

        def project(name, x):
            x = nn.Dense(features, use_bias=self.use_bias, kernel_init=XAVIER, dtype=self.dtype, name=name)(x)
            x = rearrange(x, "b n (h d) -> b n h d", h=self.heads)
            return nn.with_logical_constraint(x, ("batch", "tokens", "heads", None))

        q, k, v = project("query", queries), project("key", context), project("value", context)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(features // self.heads)).astype(self.dtype)
        out = rearrange(jnp.einsum("bhqk,bkhd->bqhd", weights, v), "b n h d -> b n (h d)")
        return nn.Dense(features, kernel_init=XAVIER, dtype=self.dtype, name="out")(out)


class FeedForward(nn.Module):
    """Dense to four times the width, GELU (tanh form, as DiT), Dense back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        hidden = nn.Dense(4 * x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name="up")(x)
        hidden = nn.with_logical_constraint(nn.gelu(hidden, approximate=True), ("batch", "tokens", "hidden"))
        return nn.Dense(x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name="down")(hidden)


class AdaLNZeroBlock(nn.Module):
    """DiT block: attention and MLP branches, shifted, scaled and gated by the condition; the identity at initialisation."""

    heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"], deterministic: bool
    ) -> tuple[Float[Array, "batch tokens features"], None]:
        zeros = nn.initializers.zeros
        modulation = nn.Dense(6 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="modulation")(
            nn.silu(condition)
        )
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation[:, None], 6, axis=-1)
        h = layer_norm("norm_attention", affine=False, dtype=self.dtype)(x) * (1 + scale_a) + shift_a
        h = Attention(self.heads, use_bias=True, dtype=self.dtype, name="attention")(h, h)
        x = x + gate_a * nn.Dropout(self.dropout)(h, deterministic)
        h = layer_norm("norm_mlp", affine=False, dtype=self.dtype)(x) * (1 + scale_m) + shift_m
        h = FeedForward(dtype=self.dtype, name="mlp")(h)
        x = x + gate_m * nn.Dropout(self.dropout)(h, deterministic)
        return nn.with_logical_constraint(x, TOKENS), None


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: tokens attend to themselves, then to `context`, then an MLP."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens features"], context: Float[Array, "batch keys features"]
    ) -> tuple[Float[Array, "batch tokens features"], None]:
        h = layer_norm("norm_self", affine=True, dtype=self.dtype)(x)
        x = x + Attention(self.heads, use_bias=False, dtype=self.dtype, name="self_attention")(h, h)
        h = layer_norm("norm_cross", affine=True, dtype=self.dtype)(x)
        x = x + Attention(self.heads, use_bias=False, dtype=self.dtype, name="cross_attention")(h, context)
        h = layer_norm("norm_mlp", affine=True, dtype=self.dtype)(x)
        x = x + FeedForward(dtype=self.dtype, name="mlp")(h)
        return nn.with_logical_constraint(x, TOKENS), None


def stack(block: Callable[..., nn.Module], layers: int, *, remat: bool, unroll: bool, static_argnums=(), **kwargs):
    """`layers` copies of `block` under one `nn.scan`: parameters are stacked [L, ...] whether unrolled or not.

    `unroll=True` compiles the layers one after another, which lets XLA fuse across them at the price of compile time;
    the parameter tree is the same, so checkpoints, sharding rules and converters never notice.
    """
    if remat:
        block = nn.remat(block, prevent_cse=False, static_argnums=static_argnums)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=layers,
        unroll=layers if unroll else 1,
    )
    return scanned(**kwargs)
