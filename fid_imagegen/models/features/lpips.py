"""LPIPS v0.1 on VGG16 (Zhang et al. 2018, arXiv 1801.03924, eq. 1), the training metric of Song et al. 2023."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce, repeat
from jaxtyping import Array, Float

from fid_imagegen.models.features.vgg16 import STAGES, VGG16

# ImageNet's mean and standard deviation seen from [-1, 1], rounded as the reference code rounds them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def unit_normalise(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
    """x / (|x| + 1e-10) over channels.

    The floor under the square root keeps its derivative finite where all channels are dead. In the reference it is NaN
    there, which ReLU's backward pass hides but forward mode and `jax_debug_nans` meet.
    """
    squares = reduce(jnp.square(x), "b h w c -> b h w 1", "sum")
    return x / (jnp.sqrt(jnp.maximum(squares, 1e-20)) + 1e-10)


class LPIPS(nn.Module):
    """The metric as a module: `vgg16` and one weight per channel of each activation, `lin0` to `lin4`."""

    @nn.compact
    def __call__(
        self, a: Float[Array, "batch height width 3"], b: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch"]:
        # Two passes, not one of twice the batch: where `b` is a stopped target its backward pass is never built.
        vgg16, shift, scale = VGG16(name="vgg16"), jnp.asarray(SHIFT), jnp.asarray(SCALE)
        features_a, features_b = vgg16((a - shift) / scale), vgg16((b - shift) / scale)
        distance = jnp.zeros(a.shape[0])
        for layer, (x, y, (channels, _)) in enumerate(zip(features_a, features_b, STAGES, strict=True)):
            weights_C = self.param(f"lin{layer}", nn.initializers.uniform(1.0), (channels,))
            squared = jnp.square(unit_normalise(x) - unit_normalise(y))
            distance += reduce(squared @ weights_C, "b h w -> b", "mean")
        return distance


def lpips_distance(
    params,
    a: Float[Array, "batch height width channels"],
    b: Float[Array, "batch height width channels"],
    *,
    resize_to: int | None = 224,
) -> Float[Array, "batch"]:
    """LPIPS between float images in [-1, 1], NHWC with 1 (repeated to 3) or 3 channels; one value >= 0 per pair.

    Both images are resized bilinearly to `resize_to` x `resize_to` pixels, as consistency models do below 256 px; None
    keeps their size. No antialiasing: `F.interpolate`, which published results used, has none; enlarging, the two agree.
    Song et al.'s torch code also swaps VGG16's max-pools for averages (piq, `replace_pooling`); here they stay maxima, as
    in the LPIPS code and in Song et al.'s JAX code for CIFAR-10. The weights are frozen: gradients reach `a` and `b` only.
    `params` are those of `interop.lpips.load_lpips`.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] not in (1, 3):
        raise ValueError(f"found shapes {a.shape} and {b.shape}, expected one [B, H, W, 1 or 3]; pair the images first")
    if not (jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)):
        raise ValueError(f"found dtypes {a.dtype} and {b.dtype}, expected floats in [-1, 1]; scale with x / 127.5 - 1")

    def prepare(x):
        if resize_to is not None:
            x = jax.image.resize(x, (x.shape[0], resize_to, resize_to, x.shape[-1]), "bilinear", antialias=False)
        return repeat(x, "b h w 1 -> b h w 3") if x.shape[-1] == 1 else x

    return LPIPS().apply({"params": jax.lax.stop_gradient(params)}, prepare(a), prepare(b))
