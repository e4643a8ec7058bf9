"""Resize, crop and flip against what they must do to known images."""

import numpy as np
import pytest

from fid_imagegen.data.transforms import random_flip, resize_and_crop


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_at_its_own_size(channels):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype=np.uint8)
    np.testing.assert_array_equal(resize_and_crop(image, (16, 16)), image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(16, 16), (16, 37), (37, 16), (100, 41), (33, 34)])
def test_shape(shape, channels):
    image = resize_and_crop(np.zeros((*shape, channels), np.uint8), (16, 16))
    assert image.shape == (16, 16, channels) and image.dtype == np.uint8


def test_crop_is_the_centre_rounded_down():
    columns = np.broadcast_to(np.arange(13, dtype=np.uint8)[None, :, None], (8, 13, 1))
    assert resize_and_crop(columns, (8, 8))[0, :, 0].tolist() == list(range(2, 10))
    np.testing.assert_array_equal(
        resize_and_crop(columns.swapaxes(0, 1), (8, 8)), resize_and_crop(columns, (8, 8)).swapaxes(0, 1)
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_resize_keeps_the_aspect(axis):
    # White on the middle 32 of 64 columns: the crop of an image twice as wide as high.
    image = np.zeros((32, 64, 1), np.uint8)
    image[:, 16:48] = 255
    found = resize_and_crop(image.swapaxes(0, axis), (16, 16))
    assert found.min() > 200 and found[2:-2, 2:-2].min() == 255


def test_resize_averages_what_it_drops():
    # Without antialias a checkerboard of single pixels aliases to black, white or a coarser board.
    board = (255 * (np.indices((64, 64)).sum(0) % 2)).astype(np.uint8)[..., None]
    for size in (16, 13):
        assert np.abs(resize_and_crop(board, (size, size)).astype(int) - 127.5).max() < 4


def test_nothing_is_enlarged():
    with pytest.raises(ValueError, match="found an image of 20x7 pixels, expected at least 8x8, .*; lower image_size"):
        resize_and_crop(np.zeros((20, 7, 3), np.uint8), (8, 8))


def test_flip_follows_the_lowest_bit_of_each_row():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    flipped = random_flip(images, np.array([0, 1, 2**63, 2**63 + 1], np.uint64))
    np.testing.assert_array_equal(flipped[[0, 2]], images[[0, 2]])
    np.testing.assert_array_equal(flipped[[1, 3]], images[[1, 3]][:, :, ::-1])
