"""U-ViT in pixels: a Transformer over level, label and patches alike, with a U-Net's long skips.

Bao et al. 2023 (arXiv 2209.12152); what the paper leaves open follows the authors' public code.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fid_imagegen.models.layers import (
    TOKENS,
    Attention,
    FeedForward,
    check_image,
    check_labels,
    patchify,
    sin_cos_levels,
    stack,
    unpatchify,
    wide,
)
from fid_imagegen.models.products import Dense

# CIFAR-10 is S with patches of 2, CelebA-64 S with 4, ImageNet-64 M or L with 4.
UVITS = {
    "tiny": {"width": 128, "heads": 4, "depth": 6},
    "S": {"width": 512, "heads": 8, "depth": 12},
    "M": {"width": 768, "heads": 12, "depth": 16},
    "L": {"width": 1024, "heads": 16, "depth": 20},
}

NORMAL = nn.initializers.normal(0.02)
CONVOLUTION = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's own, which the authors leave
Tokens = Float[Array, "batch tokens features"]


class UViTBlock(nn.Module):
    """Where a skip comes in, Dense over it and the tokens; then attention and MLP, both pre-norm and residual."""

    heads: int
    qk_norm: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, skip: Tokens | None, deterministic: bool) -> tuple[Tokens, Tokens]:
        if skip is not None:
            both = jnp.concatenate([x, skip], axis=-1)
            x = Dense(x.shape[-1], kernel_init=NORMAL, dtype=self.dtype, name="join")(both)
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_attention")(x)
        attention = Attention(
            self.heads, use_bias=False, qk_norm=self.qk_norm, kernel_init=NORMAL, dtype=self.dtype, name="attention"
        )
        h = attention(h, h)
        x = x + nn.Dropout(self.dropout)(h, deterministic)
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_mlp")(x)
        h = FeedForward(exact=True, kernel_init=NORMAL, dtype=self.dtype, name="mlp")(h)
        x = nn.with_logical_constraint(x + nn.Dropout(self.dropout)(h, deterministic), TOKENS)
        return x, x


class UViT(nn.Module):
    """Images of `image_size`, (height, width), in and out: its positions are learned, so it has but one size.

    depth: an even number; half the blocks encode, one lies in the middle, and each of the other half takes the output of
    its counterpart, the last of the encoder's first. The scanned stack `encoder` holds the middle block as its last.
    num_classes: of real labels; label `num_classes` is the null class, for classifier-free guidance as in `dit.DiT`. The
    authors' ImageNet-64 models lack it: their tables are a row shorter.
    qk_norm: `layers.Attention`'s; the authors' models have none.
    level_scale: what c_noise is multiplied by; sin-cos embeddings are made for 0..1000.
    """

    image_size: tuple[int, int]
    channels: int
    patch: int
    width: int
    heads: int
    depth: int
    num_classes: int = 0
    qk_norm: bool = False
    level_scale: float = 1000.0
    dropout: float = 0.0
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BHWC: Float[Array, "batch height width channels"],
        levels_BK: Float[Array, "batch K"],
        label_B: Int[Array, "batch"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch height width channels"]:
        """The raw output, at least float32. `levels_BK`: the noise level as preconditioning says it; `label_B` is needed when
        `num_classes` > 0.

        Raises ValueError for other channels or sizes, sizes that `patch` does not divide, odd depths, and missing labels.
        """
        self._check(x_BHWC)
        patches = Dense(self.width, kernel_init=CONVOLUTION, dtype=self.dtype, name="patches")(
            patchify(x_BHWC, self.patch)
        )
        extras = [sin_cos_levels(self.level_scale * levels_BK.astype(wide(levels_BK.dtype)), self.width)]
        if self.num_classes:
            check_labels(label_B, self.num_classes)
            embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=nn.initializers.normal(1.0), name="label")
            extras.insert(0, embed(label_B)[:, None])
        tokens = jnp.concatenate([*(extra.astype(self.dtype) for extra in extras), patches], axis=1)
        tokens = tokens + self.param("positions", NORMAL, tokens.shape[1:]).astype(self.dtype)
        tokens = nn.with_logical_constraint(tokens, TOKENS)

        shared = {
            "remat": self.remat,
            "unroll": self.unroll,
            "static_argnums": (3,),
            "heads": self.heads,
            "qk_norm": self.qk_norm,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        half, every = self.depth // 2, nn.broadcast
        encoder = stack(UViTBlock, half + 1, in_axes=(every, every), name="encoder", **shared)
        decoder = stack(UViTBlock, half, in_axes=(0, every), name="decoder", **shared)
        tokens, skips = encoder(tokens, None, deterministic)
        tokens, _ = decoder(tokens, skips[:half][::-1], deterministic)

        x = nn.LayerNorm(epsilon=1e-5, dtype=wide(self.dtype), name="norm")(tokens[:, -patches.shape[1] :])
        x = Dense(self.patch**2 * self.channels, kernel_init=NORMAL, dtype=wide(self.dtype), name="head")(x)
        x = unpatchify(x, self.patch, self.image_size[0] // self.patch)
        return nn.Conv(self.channels, (3, 3), kernel_init=CONVOLUTION, dtype=wide(self.dtype), name="smooth")(x)

    def _check(self, x_BHWC: Array) -> None:
        check_image(x_BHWC, self.channels, self.patch)
        if x_BHWC.shape[1:3] != tuple(self.image_size):
            found, expected = ("x".join(map(str, size)) for size in (x_BHWC.shape[1:3], self.image_size))
            raise ValueError(
                f"found images of {found}, expected {expected}; resize them or change the model's image_size"
            )
        if self.depth % 2:
            raise ValueError(f"found depth {self.depth}, expected an even number; change the model's depth")
