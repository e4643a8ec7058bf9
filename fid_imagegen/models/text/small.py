"""A text encoder small enough to be trained from scratch together with Stage C, on a set's own captions."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fid_imagegen.models.text.clip import TextTransformer


class SmallTextEncoder(nn.Module):
    """4 pre-norm layers x 128 with learned positions; every token sees all that are not padding.

    Same interface as `CLIPTextEncoder`; "pooled" is the mean over the tokens that are not padding.
    """

    vocabulary: int
    length: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "batch tokens"],
        mask_BT: Bool[Array, "batch tokens"] | None = None,
        deterministic: bool = True,  # part of the interface: nothing here is random
    ) -> dict[str, Array]:
        mask_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT.astype(bool)
        batch, count = tokens_BT.shape
        transformer = TextTransformer(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=4 * self.width,
            vocabulary=self.vocabulary,
            length=self.length,
            activation="gelu",
            dtype=self.dtype,
            name="transformer",
        )
        x_BTD = transformer(tokens_BT, jnp.broadcast_to(mask_BT[:, None], (batch, count, count)))
        return {"tokens": x_BTD, "pooled": jnp.mean(x_BTD, axis=1, where=mask_BT[..., None])}
