"""Depthwise convolution that is quick on CPU too."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PADDINGS = {"zero": "constant", "edge": "edge"}


class DepthwiseConv(nn.Module):
    """A k x k filter for each channel, padded by k // 2 on every side as PyTorch does; kernel [k, k, 1, channels] and bias.

    XLA's grouped convolution is slow on CPU (34 ms against torch's 0.3 at one shape): there it is k^2 shifted
    multiply-adds, elsewhere `lax.conv_general_dilated`; the same parameters and the same sums.
    """

    kernel: int = 3
    stride: int = 1
    padding: str = "zero"  # or edge: replicated border
    use_bias: bool = True
    kernel_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns channels"]:
        channels, border = x.shape[-1], self.kernel // 2
        weights = self.param("kernel", self.kernel_init, (self.kernel, self.kernel, 1, channels))
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (border, border), (border, border), (0, 0)), PADDINGS[self.padding])
        convolve = shifted_sums if jax.default_backend() == "cpu" else grouped_convolution
        out = convolve(x, weights.astype(self.dtype), self.stride)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        return out


def shifted_sums(x: Array, weights: Array, stride: int) -> Array:
    """The valid depthwise convolution as one multiply-add for each tap."""
    height, width = ((size - weights.shape[0]) // stride + 1 for size in x.shape[1:3])
    total = 0.0
    for row in range(weights.shape[0]):
        for column in range(weights.shape[1]):
            rows = slice(row, row + (height - 1) * stride + 1, stride)
            columns = slice(column, column + (width - 1) * stride + 1, stride)
            total += x[:, rows, columns] * weights[row, column, 0]
    return total


def grouped_convolution(x: Array, weights: Array, stride: int) -> Array:
    """The same by XLA's convolution with one group a channel."""
    return jax.lax.conv_general_dilated(
        x,
        weights,
        window_strides=(stride, stride),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
