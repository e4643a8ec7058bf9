import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.autoencoder_kl import AutoencoderKL

TINY = {
    "in_channels": 3,
    "latent_channels": 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (2, 6, 8, 3), minval=-1, maxval=1)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(AutoencoderKL(**TINY).init)(jax.random.key(1), images)


def test_shapes_and_types(params, images):
    for dtype in (jnp.float32, jnp.bfloat16):
        model = AutoencoderKL(**TINY, dtype=dtype)
        mean, log_variance = jax.eval_shape(lambda m=model: m.apply(params, images, method="encode"))
        assert mean.shape == log_variance.shape == (2, 3, 4, 2) and mean.dtype == log_variance.dtype == jnp.float32
        decoded = jax.eval_shape(lambda m=model: m.apply(params, jnp.zeros((2, 3, 4, 2)), method="decode"))
        assert decoded.shape == images.shape and decoded.dtype == jnp.float32


def test_the_whole_is_the_decoder_of_the_mean(params, images):
    model = AutoencoderKL(**TINY)

    @jax.jit
    def run(params, images):
        mean, log_variance = model.apply(params, images, method="encode")
        parts = model.apply(params, mean, method="decode")
        return model.apply(params, images), parts, log_variance

    whole, parts, log_variance = run(params, images)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert np.std(whole) > 1e-3 and np.abs(log_variance).max() < 20


def test_log_variance_is_clamped(params, images):
    far = jax.tree.map(lambda leaf: leaf, params)
    far["params"]["quant_conv"]["bias"] = jnp.asarray([0.0, 0.0, 1e4, -1e4])
    _, log_variance = AutoencoderKL(**TINY).apply(far, images, method="encode")
    assert np.all(log_variance[..., 0] == 20) and np.all(log_variance[..., 1] == -30)


def test_sizes_that_do_not_divide_are_refused(params):
    with pytest.raises(ValueError, match="found images of 7x8, expected multiples of 2"):
        AutoencoderKL(**TINY).apply(params, jnp.zeros((1, 7, 8, 3)))
