"""Decoding, channels, resize and crop of one image, and random crops and flips of a batch. All on uint8."""

import io

import numpy as np
from jaxtyping import Bool, UInt8, UInt64
from PIL import ExifTags, Image, ImageOps

RESAMPLING = Image.Resampling.BICUBIC


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """The image of a PNG, JPEG or WebP file, turned upright as its EXIF orientation says; for `channels` see `with_channels`.

    Errors: PIL's, for bytes that are not a whole image.
    """
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return with_channels(image, channels)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened file's picture as `decode` turns it, by its header alone."""
    # `Image`'s own `getexif`: that of a PNG without orientation decodes all pixels to look for one behind them.
    sideways = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) > 4
    return image.size if sideways else image.size[::-1]


def with_channels(
    image: Image.Image | UInt8[np.ndarray, "height width _"], channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """A PIL image, or an array of 1 (grey), 3 (RGB) or 4 (RGBA) channels, in 1 or 3 channels, transparency on white.

    PIL's "L" gives 1 channel and "RGB" 3. An array that has `channels` comes back as it is.
    Errors: ValueError for pixels of more than 8 bits, which PIL would clip instead of scale.
    """
    if isinstance(image, np.ndarray):
        if image.shape[-1] == channels:
            return image
        image = _picture(image)
    if more_than_8_bits(image):
        raise ValueError(f"found pixel mode {image.mode}, expected 8 bits per channel; convert the image to 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def more_than_8_bits(image: Image.Image) -> bool:
    """Whether PIL holds the pixels as 16- or 32-bit integers or floats."""
    return image.mode.startswith(("I", "F"))


def resize_and_crop(
    image: UInt8[np.ndarray, "rows columns channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width channels"]:
    """Shrinks the image until it just covers `size` = (height, width), then cuts the centre; identity for an image of that size.

    PIL's BICUBIC: its support grows with the reduction, so it is antialiased; it is the resize of CLIP and of clean-fid
    and rings less at edges than LANCZOS. One side becomes that of `size`, the other keeps the aspect, rounded, halves to
    even.

    Errors: ValueError for an image that does not cover `size`; nothing is enlarged silently.
    """
    (rows, columns, channels), (height, width) = image.shape, size
    if rows < height or columns < width:
        raise ValueError(
            f"found an image of {rows}x{columns} pixels, expected at least {height}x{width}, as image_size or its bucket asks "
            "for; lower image_size, change config.data.buckets or enlarge the images"
        )
    if rows * width > columns * height:
        fitted = round(rows * width / columns), width
    else:
        fitted = height, round(columns * height / rows)
    if fitted != (rows, columns):
        image = np.asarray(_picture(image).resize(fitted[::-1], RESAMPLING)).reshape(*fitted, channels)
    return centre_crop(image, size)


def centre_crop(
    image: UInt8[np.ndarray, "rows columns channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width channels"]:
    """The middle `size` = (height, width) of the image; it starts at floor of half of what is too much."""
    top, left = (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def random_crops(
    images_BHWC: UInt8[np.ndarray, "batch height width channels"], draws_B2: UInt64[np.ndarray, "batch 2"], size: int
) -> UInt8[np.ndarray, "batch size size channels"]:
    """A square of each image, whose first row and column its two words of 64 random bits choose."""
    places = np.array(images_BHWC.shape[1:3], np.uint64) - np.uint64(size - 1)
    corners = (draws_B2 % places).tolist()
    return np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images_BHWC, corners, strict=True)])


def random_flip(
    images_BHWC: UInt8[np.ndarray, "batch height width channels"], draws_B: UInt64[np.ndarray, "batch"]
) -> UInt8[np.ndarray, "batch height width channels"]:
    """Mirrors left and right the images that are `mirrored`."""
    return np.where(mirrored(draws_B)[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC)


def mirrored(draws_B: UInt64[np.ndarray, "batch"]) -> Bool[np.ndarray, "batch"]:
    """Whether an image of these 64 random bits is mirrored: where they are odd, i.e. with probability 1/2."""
    return draws_B % 2 == 1


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
