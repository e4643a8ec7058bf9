"""Which tasks take pictures of several shapes, of which sizes, and what the compressor sees of them."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, wuerstchen
from fid_imagegen import tasks
from fid_imagegen.tasks.latent import resized


def built(stage, **changes):
    config = wuerstchen.get_config("runlocal")[stage]  # Stage B in steps of 16 pixels, the compressor's stride 16
    config.unlock()
    config.update_from_flattened_dict(changes)
    return tasks.build(config.lock())


@pytest.mark.parametrize("task", ["consistency", "reconstruction", "stage_a"])
def test_what_trains_on_squares_takes_no_buckets(task):
    config = common.base() if task != "stage_a" else wuerstchen.stage_a()
    config.task, config.data.buckets = task, ((64, 96),)
    with pytest.raises(
        ValueError, match=rf"found buckets \(\(64, 96\),\) for task '{task}', .* expected none; set config"
    ):
        tasks.build(config)


def test_stage_b_s_halvings_divide_every_bucket():
    assert built("stage_b", **{"data.buckets": ((64, 96), (80, 64))})
    with pytest.raises(
        ValueError, match=r"found images of \[\(64, 88\)\] pixels, expected multiples of 16: the stride of"
    ):
        built("stage_b", **{"data.buckets": ((64, 96), (64, 88))})
    with pytest.raises(ValueError, match=r"found images of \[\(72, 72\)\] pixels, expected multiples of 16"):
        built("stage_b", **{"data.image_size": 72, "compressor.size": 72})


def test_the_public_stage_b_works_in_steps_of_64_pixels():
    config = wuerstchen.stage_b()
    config.text.encoder, config.data.buckets = "none", ((512, 960), (512, 928))
    with pytest.raises(ValueError, match=r"found images of \[\(512, 928\)\] pixels, expected multiples of 64"):
        tasks.build(config)


@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_the_compressor_sees_whole_pixels(stage):
    changes = {"data.image_size": 64, "compressor.size": 45}
    with pytest.raises(
        ValueError, match=r"found images of \[\(64, 96\)\] .* multiples of 64: of 64 pixels the compressor sees 45"
    ):
        built(stage, **changes | {"data.buckets": ((64, 96), (64, 128))})
    assert built(stage, **changes | {"data.buckets": ((64, 128),)})


def test_a_position_of_the_published_latents_is_a_fraction_of_pixels():
    assert tasks.build(wuerstchen.get_config("paper,b_no_text").stage_b).stride == Fraction(128, 3)


def test_both_sides_shrink_alike():
    """A bucket's image is seen at the scale at which a square is."""
    square = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    wide = jnp.concatenate([square, square[:, :, ::-1]], axis=2)
    seen, whole = resized(square, Fraction(3, 4)), resized(wide, Fraction(3, 4))
    assert seen.shape == (2, 24, 24, 3) and whole.shape == (2, 24, 48, 3)
    np.testing.assert_allclose(whole[:, :, :22], seen[:, :, :22], atol=1e-6)  # away from the seam
    assert resized(wide, Fraction(1)) is wide


@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_losses_take_every_bucket(stage):
    """Parameters made for squares; the shapes inside are the models' own affair."""
    made = built(stage, **{"data.buckets": ((64, 96), (96, 64)), "compressor.size": 32})
    params, stats = jax.eval_shape(made.init, jax.random.key(0))
    groups = params | stats | made.frozen()
    for size in ((64, 96), (96, 64), (64, 64)):
        row = jax.ShapeDtypeStruct((4,), jnp.int32)
        batch = {"image": jax.ShapeDtypeStruct((4, *size, 3), jnp.uint8), "row": row}
        batch |= {name: jax.ShapeDtypeStruct((4, 16), jnp.int32) for name in ("tokens", "mask")}
        loss, _ = jax.eval_shape(made.loss, groups, stats, batch, jax.random.key(0), jnp.int32(0))
        assert loss.shape == ()
    latents = jax.eval_shape(made.compress, groups, jax.ShapeDtypeStruct((4, 64, 96, 3), jnp.float32))
    assert latents.shape == (4, 2, 3, 16)
