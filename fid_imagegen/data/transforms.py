"""Decoding, channels, resize and crop of one image, and the random flip of a batch. All on uint8."""

import io

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image, ImageOps

RESAMPLING = Image.Resampling.BICUBIC


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """The image of a PNG, JPEG or WebP file, turned upright as its EXIF orientation says; for `channels` see `with_channels`.

    Errors: PIL's, for bytes that are not a whole image.
    """
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return with_channels(image, channels)


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
    image: UInt8[np.ndarray, "height width channels"], size: int
) -> UInt8[np.ndarray, "size size channels"]:
    """Shrinks the shorter side to `size`, then cuts the centre square; identity for an image of that size.

    PIL's BICUBIC: its support grows with the reduction, so it is antialiased; it is the resize of CLIP and of clean-fid
    and rings less at edges than LANCZOS. The longer side becomes round(longer * size / shorter), halves to even; the
    crop starts at floor((longer - size) / 2).

    Errors: ValueError for a shorter side below `size`; nothing is enlarged silently.
    """
    height, width, channels = image.shape
    shorter = min(height, width)
    if shorter < size:
        raise ValueError(
            f"found an image of {height}x{width} pixels, expected a shorter side of at least image_size={size}; "
            "lower image_size or enlarge the images"
        )
    if shorter > size:
        height, width = round(height * size / shorter), round(width * size / shorter)
        image = np.asarray(_picture(image).resize((width, height), RESAMPLING)).reshape(height, width, channels)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def random_flip(
    images_BHWC: UInt8[np.ndarray, "batch height width channels"], draws_B: UInt64[np.ndarray, "batch"]
) -> UInt8[np.ndarray, "batch height width channels"]:
    """Mirrors left and right the images whose 64 random bits are odd, i.e. each with probability 1/2."""
    mirrored_B = (draws_B % 2).astype(bool)
    return np.where(mirrored_B[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
