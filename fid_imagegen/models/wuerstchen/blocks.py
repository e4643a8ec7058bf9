"""Blocks that Stage B and Stage C share: ConvNeXt block, modulation by the noise level, attention to image and text.

Würstchen (Pernias et al. 2024, arXiv 2306.00637); facts that the paper leaves open follow its public weights. Parameters start
as in the authors' code. Residual branches are in `dtype`; noise level, norms and modulation are in float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fid_imagegen.models.layers import XAVIER, wide
from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv

IMAGE = ("batch", None, None, "features")
HIDDEN = ("batch", None, None, "hidden")
HEADS = ("batch", "tokens", "heads", None)
Image = Float[Array, "batch height width channels"]
KeysValues = tuple[Float[Array, "batch tokens heads features"], Float[Array, "batch tokens heads features"]]

LEVEL_SCALE = 10_000.0  # of the public weights

normal_init = nn.initializers.normal(0.02)


def xavier_init(gain: float) -> nn.initializers.Initializer:
    """Xavier's uniform initialiser, its deviation multiplied by `gain`."""
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def layer_norm(x: Array) -> Array:
    """Layer normalisation over the last axis without scale and bias, epsilon 1e-6; computed in float32, returned as given."""
    centred = x.astype(wide(x.dtype))
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def level_embedding(r_B: Float[Array, "batch"], width: int, scale: float = LEVEL_SCALE) -> Float[Array, "batch width"]:
    """[sin, cos] of `scale` r at frequencies from 1 to 1e-4; an odd width ends in a zero. At least float32.

    Phases reach 10,000 radians: `r_B` in bfloat16 is wrong by up to 40 of them, and one unit in the last place of a
    frequency is 1e-3 of phase. So the table repeats PyTorch's rounding: arguments in float32, exponentials rounded once.
    """
    half = width // 2
    if half < 2:
        raise ValueError(f"found a level embedding {width} wide, expected at least 4; change c_r")
    arguments = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
    frequencies = np.exp(arguments.astype(np.float64)).astype(np.float32)
    phases_BF = (scale * r_B.astype(wide(r_B.dtype)))[:, None] * frequencies
    return jnp.concatenate([jnp.sin(phases_BF), jnp.cos(phases_BF), jnp.zeros_like(phases_BF[:, : width % 2])], axis=-1)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's competition of channels (arXiv 2301.00808): x + gamma x n + beta, n the channel's norm over the mean norm."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        gamma = self.param("gamma", nn.initializers.zeros, x.shape[-1:])
        beta = self.param("beta", nn.initializers.zeros, x.shape[-1:])
        x_wide = x.astype(wide(x.dtype))
        squares = jnp.sum(jnp.square(x_wide), axis=(1, 2), keepdims=True)
        # A channel that GELU silenced has norm zero, where the square root has no gradient.
        norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
        relative = norms / (jnp.mean(norms, axis=-1, keepdims=True) + 1e-6)
        return (gamma * (x_wide * relative) + beta + x_wide).astype(x.dtype)


class ConvBlock(nn.Module):
    """x + MLP(norm(depthwise(x)), skip): four times as wide inside, `skip` concatenated after the norm.

    `gain` shrinks the last layer's first weights: sqrt(1 / blocks of the network).
    """

    kernel: int
    dropout: float
    gain: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image, skip: Image | None, deterministic: bool) -> Image:
        h = layer_norm(DepthwiseConv(kernel=self.kernel, dtype=self.dtype, name="depthwise")(x))
        if skip is not None:
            h = jnp.concatenate([h, skip], axis=-1)
        h = nn.Dense(4 * x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name="up")(h)
        h = nn.with_logical_constraint(nn.gelu(h, approximate=False), HIDDEN)
        h = nn.Dropout(self.dropout)(GlobalResponseNorm(name="response_norm")(h), deterministic)
        h = nn.Dense(x.shape[-1], kernel_init=xavier_init(self.gain), dtype=self.dtype, name="down")(h)
        return nn.with_logical_constraint(x + h, IMAGE)


class TimestepBlock(nn.Module):
    """x (1 + scale) + shift, both linear in the level's embedding; the identity at initialisation."""

    @nn.compact
    def __call__(self, x: Image, embedding: Float[Array, "batch width"]) -> Image:
        mapper = nn.Dense(2 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=embedding.dtype, name="mapper")
        scale, shift = jnp.split(mapper(embedding)[:, None, None], 2, axis=-1)
        return (x * (1 + scale) + shift).astype(x.dtype)


class AttentionBlock(nn.Module):
    """x + attention of the normed image over itself and, in the same softmax, over the text.

    Dropout falls on the branch's output as in diffusers; the authors' training dropped attention weights, which fused attention
    never holds. Einsums, as JAX's own function has its softmax in float32 even in float64.
    """

    features: int
    heads: int
    text: bool
    dropout: float
    dtype: Any = jnp.float32

    def setup(self):
        if self.features % self.heads:
            raise ValueError(
                f"found width {self.features} with {self.heads} heads, expected a multiple; change width or heads"
            )
        dense = lambda init: nn.Dense(self.features, kernel_init=init, dtype=self.dtype)  # noqa: E731
        # The authors draw query, key and value as one matrix to three times the width: half of Xavier's variance.
        self.query, self.key, self.value = (dense(xavier_init(math.sqrt(0.5))) for _ in range(3))
        self.out = dense(XAVIER)
        if self.text:
            self.text_mapper = dense(XAVIER)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: Image, text: KeysValues | None, deterministic: bool) -> Image:
        tokens = rearrange(layer_norm(x), "b h w c -> b (h w) c")
        keys, values = self._split(self.key(tokens)), self._split(self.value(tokens))
        if text is not None:
            keys, values = jnp.concatenate([keys, text[0]], axis=1), jnp.concatenate([values, text[1]], axis=1)
        queries = self._split(self.query(tokens)) / math.sqrt(self.features // self.heads)
        logits = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=wide(self.dtype))
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(self.dtype), values)
        out = self.drop(self.out(rearrange(out, "b n h d -> b n (h d)")), deterministic)
        return nn.with_logical_constraint(x + out.reshape(x.shape), IMAGE)

    def keys_values(self, text_BTD: Float[Array, "batch tokens width"]) -> KeysValues:
        """What `__call__` needs of the text."""
        mapped = self.text_mapper(nn.silu(text_BTD))
        return self._split(self.key(mapped)), self._split(self.value(mapped))

    def _split(self, x):
        return nn.with_logical_constraint(rearrange(x, "b n (h d) -> b n h d", h=self.heads), HEADS)


class Block(nn.Module):
    """ConvBlock, TimestepBlock and, unless `heads` is 0, AttentionBlock: "CTA" or "CT" in the authors' words."""

    features: int
    heads: int
    text: bool
    kernel: int
    dropout: float
    gain: float
    dtype: Any = jnp.float32

    def setup(self):
        self.residual = ConvBlock(self.kernel, self.dropout, self.gain, self.dtype)
        self.timestep = TimestepBlock()
        if self.heads:
            self.attention = AttentionBlock(self.features, self.heads, self.text, self.dropout, self.dtype)

    def __call__(
        self,
        x: Image,
        embedding: Float[Array, "batch width"],
        skip: Image | None,
        text: KeysValues | None,
        deterministic: bool,
    ) -> tuple[Image, None]:
        x = self.timestep(self.residual(x, skip, deterministic), embedding)
        return (self.attention(x, text, deterministic) if self.heads else x), None

    def condition(self, carry: None, text_BTD: Float[Array, "batch tokens width"]) -> tuple[None, KeysValues]:
        """(carry, the attention's keys and values of the text): a scan's form."""
        return carry, self.attention.keys_values(text_BTD)


def single_block(*, remat: bool, **fields) -> Block:
    """One Block, recomputed in the backward pass where `remat`."""
    return (nn.remat(Block, static_argnums=(5,)) if remat else Block)(**fields)


def stack_blocks(layers: int, *, remat: bool, unroll: bool, **fields) -> Block:
    """`layers` equal Blocks as one: parameters, and the keys and values of the text, are stacked [L, ...]."""
    block = nn.remat(Block, prevent_cse=False, static_argnums=(5,)) if remat else Block
    scan = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": layers,
        "unroll": layers if unroll else 1,
    }
    every = nn.broadcast
    methods = {"__call__": scan | {"in_axes": (every, every, 0, every)}, "condition": scan | {"in_axes": (every,)}}
    return nn.scan(block, methods=methods)(**fields)


def check_channels(what: str, x: Array, channels: int) -> None:
    """Raises ValueError unless the last axis of `x` has `channels`."""
    if x.shape[-1] != channels:
        raise ValueError(
            f"found {what} of shape {x.shape}, expected {channels} channels last; give the {what} this model was made for"
        )
