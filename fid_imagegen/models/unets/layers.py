"""What the U-Nets share: features of the noise level, resampling by two, convolutions, norms, self-attention."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Array, Float, Shaped

from fid_imagegen.models.products import Dense, attend

Dtype = Any
Image = Float[Array, "batch height width channels"]
IMAGE = ("batch", None, None, "features")
ZEROS = nn.initializers.zeros
FIR = (1, 3, 3, 1)


def level_features(levels_BK: Float[Array, "batch K"], frequencies: np.ndarray) -> Float[Array, "batch features"]:
    """[cos, sin] of each level times each frequency, in float32 at least: phases reach 1500."""
    phases = levels_BK[..., None] * jnp.asarray(frequencies, jnp.promote_types(levels_BK.dtype, jnp.float32))
    return rearrange(jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1), "b k f -> b (k f)")


def sin_cos_frequencies(count: int, *, endpoint: bool) -> np.ndarray:
    """`count` frequencies, log-spaced from 1 down to 1 / 10,000, which is the last with `endpoint` and else the one after."""
    return np.geomspace(1, 1e-4, count if endpoint else count + 1)[:count]


def fourier_frequencies(count: int, scale: float) -> np.ndarray:
    """`count` normal frequencies of deviation 2 pi scale, drawn from seed 0: the same in every model.

    Constants, for a parameter would be averaged, sharded and, sooner or later, trained.
    """
    return 2 * np.pi * scale * np.random.default_rng(0).standard_normal(count)


def _fir(x: Image, *, padding: int, stride: int = 1, dilation: int = 1) -> Image:
    """Each channel under the separable filter [1, 3, 3, 1]; `dilation` puts zeros between pixels and keeps their mean."""
    taps = np.asarray(FIR) / sum(FIR) * dilation
    kernel = jnp.asarray(np.outer(taps, taps), x.dtype)[:, :, None, None]
    return jax.lax.conv_general_dilated(
        x,
        jnp.tile(kernel, (1, 1, 1, x.shape[-1])),
        (stride, stride),
        2 * [(padding, padding)],
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def box_down(x: Image) -> Image:
    """Half the size: means of 2x2 pixels."""
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


def box_up(x: Image) -> Image:
    """Twice the size: every pixel four times."""
    return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)


def fir_down(x: Image) -> Image:
    """Half the size under [1, 3, 3, 1], zeros outside."""
    return _fir(x, padding=1, stride=2)


def fir_up(x: Image) -> Image:
    """Twice the size under [1, 3, 3, 1], zeros outside."""
    return _fir(x, padding=2, dilation=2)


def fir_blur(x: Image) -> Image:
    """[1, 3, 3, 1] at every position that a 3x3 convolution of stride 2, unpadded, needs to halve the size: one more pixel."""
    return _fir(x, padding=2)


RESAMPLINGS: dict[str, dict[str | None, Callable[[Image], Image]]] = {
    "box": {None: lambda x: x, "down": box_down, "up": box_up},
    "fir": {None: lambda x: x, "down": fir_down, "up": fir_up},
}


def conv(features: int, kernel: int, dtype: Dtype, name: str, init: Callable) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), padding=kernel // 2, kernel_init=init, dtype=dtype, name=name)


def group_norm(groups: int, epsilon: float, dtype: Dtype, name: str) -> nn.GroupNorm:
    # The quick variance, mean of squares minus squared mean, loses digits that parity needs.
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class SelfAttention(nn.Module):
    """What attention of the normed positions to each other adds to x: nothing at initialisation."""

    heads: int
    groups: int
    epsilon: float
    kernel_init: Callable
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Image) -> Image:
        features = x.shape[-1]
        if features % self.heads:
            raise ValueError(f"found width {features} with {self.heads} heads, expected a multiple; change the widths")
        h = rearrange(group_norm(self.groups, self.epsilon, self.dtype, "group_norm")(x), "b h w c -> b (h w) c")

        def project(name):
            tokens = Dense(features, kernel_init=self.kernel_init, dtype=self.dtype, name=name)(h)
            tokens = rearrange(tokens, "b n (h d) -> b n h d", h=self.heads)
            return nn.with_logical_constraint(tokens, ("batch", "tokens", "heads", None))

        q, k, v = (project(name) for name in ("to_q", "to_k", "to_v"))
        out = rearrange(attend(q, k, v), "b n h d -> b n (h d)")
        return Dense(features, kernel_init=ZEROS, dtype=self.dtype, name="to_out_0")(out).reshape(x.shape)


def check_input(x: Image, label_B: Shaped[Array, "batch"] | None, *, levels: int, num_classes: int) -> None:
    """Raises ValueError unless the sides of x halve `levels - 1` times and labels are there where there are classes."""
    step = 2 ** (levels - 1)
    if x.shape[1] % step or x.shape[2] % step:
        raise ValueError(
            f"found images of {x.shape[1]}x{x.shape[2]}, expected multiples of {step}; pad or crop them, or take fewer levels"
        )
    if num_classes and label_B is None:
        raise ValueError(
            f"found no labels, expected one of 0..{num_classes} for each image, the last for none; give label_B, or set "
            "num_classes = 0"
        )
