import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv, grouped_convolution, shifted_sums


@pytest.mark.parametrize(
    ("kernel", "stride", "shape"), [(3, 1, (2, 7, 5, 6)), (3, 2, (1, 8, 9, 4)), (5, 2, (1, 9, 8, 3))]
)
def test_shifted_sums_are_the_convolution(kernel, stride, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, shape[-1]))
    np.testing.assert_allclose(
        shifted_sums(x, weights, stride), grouped_convolution(x, weights, stride), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("padding", ["zero", "edge"])
def test_a_border_is_padded_as_named(padding):
    x = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    layer = DepthwiseConv(padding=padding)
    params = {"kernel": jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0), "bias": jnp.full((1,), 0.5)}
    out = layer.apply({"params": params}, x)[0, :, :, 0] - 0.5  # the pixel above and to the left
    first = 1.0 if padding == "edge" else 0.0
    assert out[0, 0] == first and out[1, 1] == 1.0 and out[2, 2] == 5.0
