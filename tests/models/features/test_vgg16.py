import jax
import jax.numpy as jnp
import pytest

from fid_imagegen.models.features.vgg16 import VGG16


def test_five_activations_at_strides_1_to_16():
    shapes, params = jax.eval_shape(VGG16().init_with_output, jax.random.key(0), jnp.zeros((2, 37, 64, 3)))
    assert [x.shape for x in shapes] == [
        (2, 37, 64, 64),
        (2, 18, 32, 128),
        (2, 9, 16, 256),
        (2, 4, 8, 512),
        (2, 2, 4, 512),
    ]
    assert len(params["params"]) == 13
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_714_688  # torchvision's vgg16().features


def test_images_too_small_for_the_last_stage_are_refused():
    with pytest.raises(ValueError, match="sides of at least 16"):
        jax.eval_shape(VGG16().init, jax.random.key(0), jnp.zeros((1, 15, 32, 3)))
