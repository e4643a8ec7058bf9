"""Each augmentation is what it says, against closed forms; its key decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.augmentations import COLOUR, GREY, augment, augmentations

DRAWS = 16


def images(count, size, channels, seed=0):
    """In [-0.4, 0.4], where a brightness is not clipped."""
    return jnp.asarray(np.random.default_rng(seed).uniform(-0.4, 0.4, (count, size, size, channels)), jnp.float32)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), DRAWS)


def draws(name, image, other=None):
    """The image under one augmentation, by `DRAWS` keys."""
    function, other = COLOUR[name], image if other is None else other
    return np.asarray(jax.vmap(lambda key: function(key, image, other))(keys()))


@pytest.fixture(scope="module")
def every():
    return jax.jit(jax.vmap(augment))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 11)])
def test_every_label_keeps_shape_and_range_and_follows_its_key(every, channels, size):
    names = list(augmentations(channels))
    label = jnp.tile(jnp.arange(len(names)), 4)
    bright = 2.5 * images(len(label), size, channels)
    made, again, moved = (
        np.asarray(every(jax.random.split(jax.random.key(seed), len(label)), bright, bright[::-1], label))
        for seed in (0, 0, 1)
    )
    assert made.shape == bright.shape and made.dtype == np.float32 and np.abs(made).max() == 1
    np.testing.assert_array_equal(made, again)
    changed, drawn = (np.abs(made - each).mean(axis=(1, 2, 3)) for each in (bright, moved))
    for index, name in enumerate(names):
        assert (changed[index :: len(names)] > 0.02).all() == (name != "identity"), name
        assert (drawn[index :: len(names)].max() > 0.01) == (name not in ("identity", "flip")), name
    np.testing.assert_array_equal(made[:: len(names)], bright[:: len(names)])


def test_grey_has_no_colours_and_other_images_are_refused():
    assert set(COLOUR) - set(GREY) == {"hue", "saturation"} and list(COLOUR)[: len(GREY)] == list(GREY)
    with pytest.raises(ValueError, match="found 4 channels, expected 1 .grey. or 3 .RGB.; change config.data.channels"):
        augmentations(4)


def test_flip_and_quarter_turns():
    (image,) = images(1, 8, 3)
    np.testing.assert_array_equal(draws("flip", image), np.stack([np.flipud(image)] * DRAWS))
    turns = [np.rot90(image), np.rot90(image, 3)]
    found = [[np.array_equal(made, turn) for turn in turns] for made in draws("quarter_turn", image)]
    assert np.sum(found, axis=1).tolist() == [1] * DRAWS and np.any(found, axis=0).all()


def test_translations_are_whole_pixels_mirrored_at_the_edges():
    (image,) = images(1, 8, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    steps = (-2, -1, 1, 2)
    shifted = {(y, x): padded[2 + y : 10 + y, 2 + x : 10 + x] for y in steps for x in steps}
    found = [
        [place for place, want in shifted.items() if np.abs(made - want).max() < 1e-5]
        for made in draws("translation", image)
    ]
    assert {len(places) for places in found} == {1} and len({places[0] for places in found}) > 5


def slopes(name):
    """(d/dy, d/dx) of a slanted plane, 0.03 a pixel in y and 0.01 in x, in the middle of what it becomes."""
    y, x = np.indices((16, 16))
    made = draws(name, jnp.asarray(0.03 * y + 0.01 * x, jnp.float32)[..., None])[..., 0]
    return np.stack([made[:, 8, 8] - made[:, 7, 8], made[:, 8, 8] - made[:, 8, 7]], axis=1)


def test_planes_turn_zoom_and_stretch():
    plane = np.array([0.03, 0.01])
    turned = slopes("rotation") @ [1, 1j] / (plane @ [1, 1j])
    np.testing.assert_allclose(np.abs(turned), 1, rtol=1e-4)
    angle = np.angle(turned)
    assert angle.min() < 0 < angle.max() and (np.abs(angle) > 0.29).all() and (np.abs(angle) < 0.81).all()
    zoomed, stretched = slopes("zoom") / plane, slopes("stretch") / plane
    np.testing.assert_allclose(zoomed[:, 0], zoomed[:, 1], rtol=1e-3)
    np.testing.assert_allclose(stretched[:, 0] * stretched[:, 1], 1, rtol=1e-3)
    for factor in (zoomed[:, 0], stretched[:, 0]):
        assert 2**-0.51 < factor.min() < 2**-0.24 and 2**0.24 < factor.max() < 2**0.51


def test_cutouts_are_grey_squares_of_half_the_side():
    found = set()
    for made in draws("cutout", jnp.ones((8, 8, 3))):
        rows, columns = np.nonzero(made[..., 0] == 0)
        assert len(rows) == 16 and np.ptp(rows) == np.ptp(columns) == 3 and (made[rows, columns] == 0).all()
        found.add((rows.min(), columns.min()))
    assert len(found) > 5


def test_brightness_contrast_and_mixup_are_affine():
    image, other = images(2, 8, 3)
    added = draws("brightness", image) - image
    ratio = draws("contrast", image) / image
    share = (draws("mixup", image, other) - image) / (other - image)
    for found in (added, ratio, share):
        middle = np.median(found, axis=(1, 2, 3), keepdims=True)
        assert np.abs(found - middle).max() < 1e-2 and np.ptp(middle) > 0.1
    assert added.min() < -0.2 and added.max() > 0.2 and np.abs(added).max() < 0.51
    assert ratio.min() < 1 < ratio.max() and ratio.max() < 2.01
    assert share.min() > 0.19 and share.max() < 0.51


def test_hue_turns_and_saturation_scales_what_is_not_grey():
    (image,) = images(1, 8, 3)
    apart = lambda x: x - x.mean(axis=-1, keepdims=True)  # noqa: E731
    hue, saturation = draws("hue", image), draws("saturation", image)
    for made in (hue, saturation):
        np.testing.assert_allclose(made.mean(axis=-1), np.stack([image.mean(axis=-1)] * DRAWS), atol=1e-6)
    norm = np.linalg.norm(apart(image), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(apart(hue), axis=-1), np.stack([norm] * DRAWS), atol=1e-5)
    cosine = np.sum(apart(hue) * apart(image), axis=-1) / norm**2
    np.testing.assert_allclose(cosine, np.broadcast_to(cosine[:, :1, :1], cosine.shape), atol=1e-2)
    assert np.cos(0.49) > cosine.max() > 0 > cosine.min()
    factor = np.linalg.norm(apart(saturation), axis=-1) / norm
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], factor.shape), rtol=1e-3)
    assert 2**-1.51 < factor.min() < 2**-0.49 and 2**0.49 < factor.max() < 2**1.51


def test_blur_keeps_what_is_flat_and_spreads_a_point():
    np.testing.assert_allclose(draws("blur", jnp.full((8, 8, 1), 0.3)), 0.3, rtol=1e-5)
    point = draws("blur", jnp.zeros((33, 33, 1)).at[16, 16].set(1.0))[..., 0]
    np.testing.assert_allclose(point.sum(axis=(1, 2)), 1, rtol=1e-2)
    np.testing.assert_allclose(point, point[:, ::-1, ::-1], atol=1e-6)
    width = np.sqrt(np.sum(point * (np.arange(33) - 16) ** 2, axis=(1, 2)))
    assert 0.45 < width.min() < 1.5 < width.max() < 3.31


def test_noise_is_gaussian():
    (image,) = images(1, 32, 3)
    added = draws("noise", image) - image
    deviation = added.std(axis=(1, 2, 3))
    assert 0.1 < deviation.min() < 0.25 < 0.35 < deviation.max() < 0.51
    assert np.abs((added**4).mean(axis=(1, 2, 3)) / deviation**4 - 3).max() < 0.5
