"""CLIP's text tower (Radford et al. 2021, arXiv 2103.00020), and the Transformer that the text encoders share.

Every text encoder maps token numbers [B, T] and a mask [B, T], True where a token stands and False on padding, to
{"tokens": [B, T, D] after the final layer norm, "pooled": [B, D]}.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fid_imagegen.models.layers import TOKENS, stack

Dtype = Any
ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's own weights; LAION's H and bigG have the exact one
}
COMMON = {"vocabulary": 49408, "length": 77, "activation": "gelu", "end": 49407}
# LAION's OpenCLIP towers: Würstchen's Stage B reads H (352,984,064 parameters), its Stage C bigG (693,021,440).
H = {"width": 1024, "layers": 24, "heads": 16, "hidden": 4096, **COMMON}
BIG_G = {"width": 1280, "layers": 32, "heads": 20, "hidden": 5120, **COMMON}
# OpenAI's ViT-L/14 (123,060,480): the 768 features a token of Stable Diffusion 1, and of Würstchen's baseline.
L = {"width": 768, "layers": 12, "heads": 12, "hidden": 3072, **COMMON, "activation": "quick_gelu"}
TOWERS = {"L": L, "H": H, "bigG": BIG_G}


def layer_norm(name: str, dtype: Dtype) -> nn.LayerNorm:
    """Affine layer normalisation with CLIP's epsilon."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


class TextBlock(nn.Module):
    """Pre-norm block: each token attends to those it sees, then an MLP. `depth`: blocks in the stack, for their scale."""

    heads: int
    hidden: int
    activation: str
    depth: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens features"], visible_BQK: Bool[Array, "batch tokens tokens"]
    ) -> tuple[Float[Array, "batch tokens features"], None]:
        width = x.shape[-1]

        def dense(features, name, deviation):
            return nn.Dense(features, kernel_init=nn.initializers.normal(deviation), dtype=self.dtype, name=name)

        def project(name, h):
            h = rearrange(dense(width, name, width**-0.5)(h), "b n (h d) -> b n h d", h=self.heads)
            return nn.with_logical_constraint(h, ("batch", "tokens", "heads", None))

        residual = (2 * self.depth * width) ** -0.5  # CLIP's initialisation: 2 * depth branches add up
        h = layer_norm("norm_attention", self.dtype)(x)
        q, k, v = project("query", h), project("key", h), project("value", h)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(width // self.heads)
        # Finite, for a row that sees nothing (padding on the left) must not be NaN.
        logits = jnp.where(visible_BQK[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        h = rearrange(jnp.einsum("bhqk,bkhd->bqhd", weights, v), "b n h d -> b n (h d)")
        x = x + dense(width, "out", residual)(h)

        h = dense(self.hidden, "up", (2 * width) ** -0.5)(layer_norm("norm_mlp", self.dtype)(x))
        h = nn.with_logical_constraint(ACTIVATIONS[self.activation](h), ("batch", "tokens", "hidden"))
        x = x + dense(width, "down", residual)(h)
        return nn.with_logical_constraint(x, TOKENS), None


class TextTransformer(nn.Module):
    """Token and learned position embeddings, `layers` blocks stacked [L, ...], a final layer norm."""

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    length: int
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, tokens_BT: Int[Array, "batch tokens"], visible_BQK: Bool[Array, "batch tokens tokens"]
    ) -> Float[Array, "batch tokens features"]:
        if self.width % self.heads:
            raise ValueError(
                f"found width {self.width} with {self.heads} heads, expected a multiple; change width or heads"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"found activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}; change `activation`"
            )
        count = tokens_BT.shape[1]
        if count > self.length:
            raise ValueError(
                f"found {count} tokens a text, expected at most {self.length}; encode with a tokenizer of that length"
            )
        normal = nn.initializers.normal
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="token")
        positions = self.param("position", normal(0.01), (self.length, self.width))
        x = nn.with_logical_constraint(embed(tokens_BT) + positions[:count].astype(self.dtype), TOKENS)
        fields = {"heads": self.heads, "hidden": self.hidden, "activation": self.activation, "depth": self.layers}
        blocks = stack(TextBlock, self.layers, remat=False, unroll=False, name="blocks", dtype=self.dtype, **fields)
        x, _ = blocks(x, visible_BQK)
        return layer_norm("norm", self.dtype)(x)


class CLIPTextEncoder(nn.Module):
    """CLIP's text tower: causal attention, pooled at the first token `end`. `H` and `BIG_G` are its public sizes.

    `projection`: width of the shared text-image space, None for the tower alone, which is what Würstchen reads; with it the
    result also holds "projected" [B, projection].
    Old configs of Hugging Face name token 2 as the end and then pool at the highest number, which is the vocabulary's
    last, `end` here. Where a row holds no `end`, its first token is pooled, as there.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    length: int
    activation: str
    end: int
    projection: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "batch tokens"],
        mask_BT: Bool[Array, "batch tokens"] | None = None,
        deterministic: bool = True,  # part of the interface: nothing here is random
    ) -> dict[str, Array]:
        count = tokens_BT.shape[1]
        visible_BQK = jnp.broadcast_to(jnp.tri(count, dtype=bool), (len(tokens_BT), count, count))
        if mask_BT is not None:
            visible_BQK = visible_BQK & mask_BT[:, None].astype(bool)
        sizes = {name: getattr(self, name) for name in ("width", "layers", "heads", "hidden", "vocabulary", "length")}
        transformer = TextTransformer(activation=self.activation, dtype=self.dtype, name="transformer", **sizes)
        x_BTD = transformer(tokens_BT, visible_BQK)
        ends_B = jnp.argmax(tokens_BT == self.end, axis=1)
        pooled_BD = jnp.take_along_axis(x_BTD, ends_B[:, None, None], axis=1)[:, 0]
        out = {"tokens": x_BTD, "pooled": pooled_BD}
        if self.projection is not None:
            normal = nn.initializers.normal(self.width**-0.5)
            project = nn.Dense(self.projection, use_bias=False, kernel_init=normal, dtype=self.dtype, name="projection")
            out["projected"] = project(pooled_BD)
        return out
