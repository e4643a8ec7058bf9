"""DiT in pixels: a fixed-resolution denoiser, the plainest rival of the generator of image functions.

    noisy image -> patches + fixed positions -> DiT blocks (adaLN-Zero) -> modulated LayerNorm, Dense -> pixels

Peebles & Xie 2023 (arXiv 2212.09748). The last layer and all modulations start at zero, so an untrained model returns zeros.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fid_imagegen.models.layers import (
    TOKENS,
    XAVIER,
    BlockStyle,
    FeatureExtractor,
    check_image,
    modulated_norm,
    patchify,
    sin_cos_positions,
    unpatchify,
    wide,
)
from fid_imagegen.models.products import Dense

DITS = {
    "tiny": {"width": 128, "heads": 4, "depth": 6},
    "S": {"width": 384, "heads": 6, "depth": 12},
    "B": {"width": 768, "heads": 12, "depth": 12},
    "L": {"width": 1024, "heads": 16, "depth": 24},
    "XL": {"width": 1152, "heads": 16, "depth": 28},
}
# The authors' weights of DiT-XL/2 on the latents of ImageNet at 256 or 512 px; their levels are the steps 0..999.
PUBLIC_DIT = DITS["XL"] | {"channels": 4, "patch": 2, "num_classes": 1000, "out_channels": 8, "level_scale": 1.0}


def column_row_positions(rows: int, columns: int, features: int) -> np.ndarray:
    """`sin_cos_positions` [rows * columns, features] with the column in the first half, as the authors' code has it."""
    return np.roll(sin_cos_positions(rows, columns, features), features // 2, axis=1)


class DiT(nn.Module):
    """Images in, images of the same height and width out; any multiple of `patch` will do, square or not.

    num_classes: of real labels; label `num_classes` is the null class. A model that was trained with it in place of some
    labels has the unconditional output that classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598).
    out_channels: as many as `channels` unless given; the public weights predict a variance beside the noise.
    level_scale: what c_noise is multiplied by; the embedder was made for 0..1000.
    """

    channels: int
    patch: int
    width: int
    heads: int
    depth: int
    num_classes: int = 0
    out_channels: int | None = None
    level_scale: float = 1000.0
    dropout: float = 0.0
    style: BlockStyle = BlockStyle()
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
    ) -> Float[Array, "batch height width out_channels"]:
        """The raw output, at least float32. `levels_BK`: the noise level as preconditioning says it; `label_B` is needed when
        `num_classes` > 0.

        Raises ValueError for other channels, sizes that `patch` does not divide, and missing labels.
        """
        check_image(x_BHWC, self.channels, self.patch)
        rows, columns = (side // self.patch for side in x_BHWC.shape[1:3])
        tokens = Dense(self.width, kernel_init=XAVIER, dtype=self.dtype, name="patches")(patchify(x_BHWC, self.patch))
        tokens = tokens + column_row_positions(rows, columns, self.width).astype(self.dtype)
        tokens, condition = FeatureExtractor(
            width=self.width,
            heads=self.heads,
            depth=self.depth,
            num_classes=self.num_classes,
            level_scale=self.level_scale,
            dropout=self.dropout,
            style=self.style,
            remat=self.remat,
            unroll=self.unroll,
            dtype=self.dtype,
            name="extractor",
        )(nn.with_logical_constraint(tokens, TOKENS), levels_BK, label_B, deterministic, (rows, columns))
        x = modulated_norm(tokens, condition, self.style.norm, self.dtype)
        features = self.patch**2 * (self.out_channels or self.channels)
        x = Dense(features, kernel_init=nn.initializers.zeros, dtype=wide(self.dtype), name="head")(x)
        return unpatchify(x, self.patch, rows)
