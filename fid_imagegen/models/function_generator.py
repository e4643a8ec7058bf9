"""The generator of image functions: a noisy image and its noise level in, the parameters of a coordinate MLP out.

    noisy image -> patches -> FeatureExtractor (DiT blocks, adaLN-Zero) -> a predictor, by the kind of function -> function

The extractor's blocks are gated by zeros at initialisation, so an untrained extractor is the identity on patch tokens, and a
predictor pre-trained on bare patch tokens fits behind it without a jump (`reconstruct`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fid_imagegen.models.coordinate_mlp import FUNCTION_PRESETS, CoordinateMLP
from fid_imagegen.models.function_predictors import PREDICTORS
from fid_imagegen.models.image_function import ImageFunctions
from fid_imagegen.models.layers import XAVIER, BlockStyle, FeatureExtractor, patchify, sin_cos_positions
from fid_imagegen.models.local_function import LOCAL_PRESETS, LocalMLP
from fid_imagegen.models.patch_function import PATCH_PRESETS, PatchMLP
from fid_imagegen.models.pixel_function import PIXEL_PRESETS, PixelMLP
from fid_imagegen.models.products import Dense

# Functions of pixels (docs/decisions/0011); the paper's are global, 5x256. The predictor holds less than half of the parameters,
# as the paper says. S has DiT-S's trunk, B and L the wider ones.
PRESETS = {
    "tiny": {"width": 128, "heads": 4, "extractor_depth": 4, "predictor_depth": 2, "function": "pixel32"},
    "S": {"width": 384, "heads": 6, "extractor_depth": 12, "predictor_depth": 6, "function": "pixel64"},
    "B": {"width": 512, "heads": 8, "extractor_depth": 16, "predictor_depth": 8, "function": "pixel64"},
    "L": {"width": 768, "heads": 12, "extractor_depth": 20, "predictor_depth": 10, "function": "pixel128"},
}

# Presets of the image functions, by kind.
KINDS = {CoordinateMLP: FUNCTION_PRESETS, LocalMLP: LOCAL_PRESETS, PatchMLP: PATCH_PRESETS, PixelMLP: PIXEL_PRESETS}


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, one Dense, and fixed 2-D sin-cos positions."""

    patch: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens features"]:
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        tokens = Dense(self.features, kernel_init=XAVIER, dtype=self.dtype, name="project")(
            patchify(x, self.patch).astype(self.dtype)
        )
        tokens = tokens + sin_cos_positions(rows, columns, self.features).astype(self.dtype)
        return nn.with_logical_constraint(tokens, ("batch", "tokens", "features"))


class FunctionGenerator(nn.Module):
    """Noisy images [batch, size, size, channels] and their noise levels -> `ImageFunctions`, in one evaluation.

    kind: the image function. The input is expected scaled by c_in (unit variance); `levels_BK` is the noise level as
    preconditioning says it.
    """

    kind: CoordinateMLP | LocalMLP | PatchMLP | PixelMLP
    image_size: int
    patch: int
    width: int
    heads: int
    extractor_depth: int
    predictor_depth: int
    num_classes: int = 0
    level_scale: float = 1000.0
    dropout: float = 0.0
    style: BlockStyle = BlockStyle()
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        if self.image_size % self.patch:
            raise ValueError(
                f"found image size {self.image_size} with patch {self.patch}, expected a multiple; "
                "change config.data.image_size, config.grid where it is set, or config.model.patch"
            )
        common = {
            "width": self.width,
            "heads": self.heads,
            "remat": self.remat,
            "unroll": self.unroll,
            "style": self.style,
            "dtype": self.dtype,
        }
        self.patches = PatchEmbedding(self.patch, self.width, dtype=self.dtype)
        self.extractor = FeatureExtractor(
            depth=self.extractor_depth,
            num_classes=self.num_classes,
            level_scale=self.level_scale,
            dropout=self.dropout,
            **common,
        )
        self.predictor = PREDICTORS[type(self.kind)](self.kind, depth=self.predictor_depth, **common)
        self.function = self.param("function", self.kind.init_shared)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        levels_BK: Float[Array, "batch K"],
        label_B: Int[Array, "batch"] | None = None,
        *,
        deterministic: bool = True,
    ) -> ImageFunctions:
        """The functions of noisy images. `label_B` is needed when `num_classes` > 0; `num_classes` itself is no label."""
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        return self._functions(*self.extractor(self.patches(x), levels_BK, label_B, deterministic, grid))

    def reconstruct(self, x: Float[Array, "batch height width channels"]) -> ImageFunctions:
        """The functions of clean images by patch embedding and predictor alone: the subject of pre-training.

        There is no noise level: what it modulates is trained in its biases, from which training goes on without a jump.
        """
        return self._functions(self.patches(x), jnp.zeros((len(x), self.width), self.dtype))

    def _functions(
        self, features: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"]
    ) -> ImageFunctions:
        per_image = self.predictor(features, condition)
        grid = (self.image_size, self.image_size)
        return ImageFunctions(kind=self.kind, grid=grid, shared=self.function, per_image=per_image)


def function_kind(
    preset: str,
    *,
    channels: int,
    image_size: int,
    patch: int,
    cutoff: str | float,
    activation: str = "relu",
    weight_update: str = "normalize",
    **sizes,
) -> CoordinateMLP | LocalMLP | PatchMLP | PixelMLP:
    """The image function of a named size, `sizes` in the place of the preset's.

    cutoff, activation and weight_update are a global function's; cutoff: "nyquist" (image_size / 2) or cycles per image. The
    bands of the others are counted by the patch, up to the Nyquist rate of its pixels if `sizes` do not say otherwise.
    """
    known = {name: kind for kind, presets in KINDS.items() for name in presets}
    if preset not in known:
        raise ValueError(
            f"found function preset {preset!r}, expected one of {sorted(known)}; change config.model.function"
        )
    kind = known[preset]
    if unknown := sorted(set(sizes) - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(
            f"found {', '.join(unknown)} for function {preset!r}, which has none; leave it out of config.model"
        )
    if kind is CoordinateMLP:
        cycles = _cycles(cutoff, image_size)
        here = {"cutoff": cycles, "activation": activation, "weight_update": weight_update}
    else:
        patches = image_size // patch
        here = {"rows": patches, "columns": patches, **_by_patch(kind, patch)}
    return kind(**({"channels": channels} | here | KINDS[kind][preset] | sizes))


def _cycles(cutoff: str | float, image_size: int) -> float:
    try:
        return image_size / 2 if cutoff == "nyquist" else float(cutoff)
    except ValueError:
        raise ValueError(
            f"found cutoff {cutoff!r}, expected 'nyquist' or cycles per image, such as 1024; change config.model.cutoff"
        ) from None


def _by_patch(kind: type, patch: int) -> dict[str, int]:
    """What a function of a place takes from the size of its patches."""
    if kind is PixelMLP:
        return {"patch": patch}
    if kind is LocalMLP:
        return {"bands": max(1, patch // 2)}
    if patch % 2:
        raise ValueError(
            f"found patch {patch} for functions of patches, expected an even one; change config.model.patch"
        )
    return {"bands": 2 * patch}
