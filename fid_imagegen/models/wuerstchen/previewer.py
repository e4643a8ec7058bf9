"""A small decoder of the compressor's latents, past Stages B and A: what the latents alone hold.

Würstchen (arXiv 2306.00637), appendix "Stage C latents"; the layers are those of Stable Cascade's previewer.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fid_imagegen.models.wuerstchen.stage_b import Upsample


class Previewer(nn.Module):
    """Stages of two convolutions, each followed by GELU and BatchNorm; from the second on a stage begins by doubling the size.

    Latents [batch, h, w, channels] to images in [0, 1] (not clipped) of 2^(len(widths) - 1) times their size.
    """

    widths: tuple[int, ...] = (512, 256, 128, 128)
    image_channels: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, latents_BHWC: Float[Array, "batch rows columns latents"], train: bool
    ) -> Float[Array, "batch height width channels"]:
        x = latents_BHWC.astype(self.dtype)

        def activate(x, name):
            x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name=name)(
                nn.gelu(x, approximate=False)
            )
            return nn.with_logical_constraint(x, ("batch", None, None, "features"))

        for stage, width in enumerate(self.widths):
            if stage:
                enter = Upsample(width, self.dtype, name=f"enter_{stage}")
            else:
                enter = nn.Conv(width, (1, 1), dtype=self.dtype, name="enter_0")
            x = activate(enter(x), f"norm_enter_{stage}")
            x = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"mix_{stage}")(x)
            x = activate(x, f"norm_mix_{stage}")
        return nn.Conv(self.image_channels, (1, 1), dtype=self.dtype, name="to_image")(x).astype(jnp.float32)
