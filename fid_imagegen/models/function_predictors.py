"""What makes the parameters of an image function of the features of an image's patches: a predictor for each kind of function.

`PREDICTORS` is the table by kind. All of them can be pre-trained by reconstruction, on bare patch tokens.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.layers import (
    NORMS,
    AdaLNZeroBlock,
    BlockStyle,
    DecoderBlock,
    modulated_norm,
    patchify,
    stack,
    unpatchify,
)
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.patch_function import PatchMLP
from fid_imagegen.models.pixel_function import PixelMLP
from fid_imagegen.models.products import Dense


class Predictor(nn.Module):
    """Features of patches and the extractor's condition -> the parameters of functions of one kind: `depth` blocks and heads."""

    kind: Any
    width: int
    heads: int
    depth: int
    remat: bool
    unroll: bool
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32

    @nn.nowrap
    def stacked(self, block: type[nn.Module], **settings) -> nn.Module:
        """The blocks, of this predictor's sizes; to be called where submodules are made."""
        sizes = {"heads": self.heads, "style": self.style, "dtype": self.dtype, "name": "blocks"}
        return stack(block, self.depth, remat=self.remat, unroll=self.unroll, **sizes, **settings)


class FunctionPredictor(Predictor):
    """Learned weight tokens that attend to themselves and to image features; one head per layer of the function.

    A layer with g predicted columns owns g tokens; its head (norm + Dense) turns each into a column over fan-in. Tokens of
    weights lie on no grid: they are not turned where `style.rotary` turns those of images.
    """

    kind: CoordinateMLP

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"]
    ) -> dict[str, Array]:
        del condition  # as in the paper, the level speaks through the features alone
        columns, norm = self.kind.columns, NORMS[self.style.norm]
        tokens = self.param("weight_tokens", nn.initializers.normal(1.0), (sum(columns), self.width))
        tokens = jnp.broadcast_to(tokens.astype(self.dtype), (features.shape[0], *tokens.shape))
        context = norm("norm_context", affine=True, dtype=self.dtype)(features)
        blocks = self.stacked(DecoderBlock)
        tokens = blocks(tokens, context)[0]
        per_image, start = {}, 0
        # But for `normalize` zero-initialised heads start every image at the shared base function.
        init = nn.initializers.lecun_normal() if self.kind.weight_update == "normalize" else nn.initializers.zeros
        for layer, ((fan_in, _), count) in enumerate(zip(self.kind.layer_sizes, columns, strict=True)):
            own = norm(f"head_norm_{layer}", affine=True, dtype=self.dtype)(tokens[:, start : start + count])
            predicted = Dense(fan_in, kernel_init=init, dtype=self.dtype, name=f"head_{layer}")(own)
            predicted = rearrange(predicted, "b g f -> b f g")
            per_image[f"columns_{layer}"] = nn.with_logical_constraint(predicted, ("batch", None, None))
            start += count
        return per_image


class LocalPredictor(Predictor):
    """Patch tokens that attend to each other, and to where they come from; one Dense makes each patch's features."""

    kind: LocalMLP | PatchMLP

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"]
    ) -> dict[str, Array]:
        del condition
        blocks = self.stacked(DecoderBlock)
        norm = NORMS[self.style.norm]
        context = norm("norm_context", affine=True, dtype=self.dtype)(features)
        angles = self.style.angles(self.kind.rows, self.kind.columns, self.width // self.heads)
        tokens = norm("head_norm", affine=True, dtype=self.dtype)(blocks(features, context, angles)[0])
        made = Dense(self.kind.features, dtype=self.dtype, name="head")(tokens)
        return {"features": rearrange(made, "b (h w) f -> b h w f", h=self.kind.rows)}


class PixelPredictor(Predictor):
    """DiT's blocks and head, told the noise level: a Dense makes the features of a patch's pixels, a 3x3 convolution joins all.

    All of it is zeros at first. A predictor that does not know the level learns more slowly, and a patch alone draws tiles that
    do not fit together (docs/decisions/0011).
    """

    kind: PixelMLP

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"]
    ) -> dict[str, Array]:
        blocks = self.stacked(AdaLNZeroBlock, static_argnums=(3,))
        angles = self.style.angles(self.kind.rows, self.kind.columns, self.width // self.heads)
        tokens = blocks(features, condition, True, angles)[0]
        zeros = nn.initializers.zeros
        tokens = modulated_norm(tokens, condition, self.style.norm, self.dtype)
        made = Dense(self.kind.features, kernel_init=zeros, dtype=self.dtype, name="head")(tokens)
        x = unpatchify(made, self.kind.patch, self.kind.rows)
        join = nn.Conv(self.kind.values, (3, 3), kernel_init=zeros, dtype=self.dtype, name="join")
        made = patchify(x + join(nn.gelu(x)), self.kind.patch)
        return {"features": rearrange(made, "b (h w) f -> b h w f", h=self.kind.rows)}


PREDICTORS = {
    CoordinateMLP: FunctionPredictor,
    LocalMLP: LocalPredictor,
    PatchMLP: LocalPredictor,
    PixelMLP: PixelPredictor,
}
