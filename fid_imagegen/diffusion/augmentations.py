"""Augmentations that `models/features/augmentation_net.py` tells apart: each leads off the images in its own way.

One is f(key, image, other) of square float images [height, width, channels] in [-1, 1]; `other` is another of the batch.
Its strength is bounded away from nothing: too weak to be seen it would be the identity under a wrong label.

After AYT (Kim et al. 2025, arXiv 2510.00658): its rotation, zoom, stretch, translation, brightness, contrast, hue,
saturation, blur, mixup and noise; flip, quarter turn, cutout and the identity make them 15. Deviation: the authors' code
applies any of its eleven together and regresses 15 numbers that tell their strengths. Here one is applied and named,
so that accuracy, against chance, says how well the net knows them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, Key

Image = Float[Array, "height width channels"]
Augmentation = Callable[[Key[Array, ""], Image, Image], Image]


def _signed(key, low: float, high: float):
    """Of either sign, its size uniform in [low, high]."""
    sign, size = jax.random.split(key)
    return jax.random.rademacher(sign, (), jnp.float32) * jax.random.uniform(size, (), minval=low, maxval=high)


def _resampled(image, matrix, shift=(0.0, 0.0)):
    """Value at y, x: the image's at matrix @ (y, x) + shift, about its centre; bilinear, mirrored beyond the edges."""
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape[:2]), indexing="ij")).astype(jnp.float32)
    centre = (jnp.asarray(image.shape[:2]) - 1) / 2
    at = lambda point: jnp.asarray(point)[:, None, None]  # noqa: E731
    places = jnp.einsum("ij,jhw->ihw", jnp.asarray(matrix), grid - at(centre)) + at(centre) + at(shift)
    channel = lambda values: map_coordinates(values, list(places), order=1, mode="mirror")  # noqa: E731
    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def identity(key, image, other):
    """The image."""
    return image


def flip(key, image, other):
    """Upside down: left and right would leave a photograph one."""
    return image[::-1]


def quarter_turn(key, image, other):
    """By 90 degrees, to either side."""
    return jnp.where(jax.random.bernoulli(key), jnp.rot90(image), jnp.rot90(image, -1))


def rotation(key, image, other):
    """By 17 to 46 degrees."""
    angle = _signed(key, 0.3, 0.8)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _resampled(image, [[cos, -sin], [sin, cos]])


def translation(key, image, other):
    """By whole pixels, an eighth to a quarter of the side along each axis: no interpolation gives it away."""
    shift = [jnp.round(_signed(each, 1 / 8, 1 / 4) * image.shape[0]) for each in jax.random.split(key)]
    return _resampled(image, jnp.eye(2), shift)


def zoom(key, image, other):
    """In or out, by a factor of 1.2 to 1.4."""
    return _resampled(image, jnp.eye(2) * 2 ** _signed(key, 0.25, 0.5))


def stretch(key, image, other):
    """Along one axis by a factor of 1.2 to 1.4, shrunk by it along the other."""
    factor = 2 ** _signed(key, 0.25, 0.5)
    return _resampled(image, [[factor, 0.0], [0.0, 1 / factor]])


def cutout(key, image, other):
    """A square of half the side, anywhere, grey."""
    size = image.shape[0] // 2
    corner = jax.random.randint(key, (2,), 0, image.shape[0] - size + 1)
    return jax.lax.dynamic_update_slice(image, jnp.zeros((size, size, image.shape[-1])), (*corner, 0))


def brightness(key, image, other):
    """A tenth to a quarter of the range brighter or darker."""
    return image + _signed(key, 0.2, 0.5)


def contrast(key, image, other):
    """Scaled about grey by a factor of 1.2 to 2, or its inverse."""
    return image * 2 ** _signed(key, 0.25, 1.0)


def hue(key, image, other):
    """Colours turned about the grey axis by 29 to 180 degrees (Rodrigues' formula)."""
    angle, axis = _signed(key, 0.5, math.pi), jnp.full((3,), 3**-0.5)
    along = jnp.mean(image, axis=-1, keepdims=True)
    return along + (image - along) * jnp.cos(angle) + jnp.cross(axis, image) * jnp.sin(angle)


def saturation(key, image, other):
    """Distance from grey scaled by a factor of 1.4 to 2.8, or its inverse."""
    grey = jnp.mean(image, axis=-1, keepdims=True)
    return grey + (image - grey) * 2 ** _signed(key, 0.5, 1.5)


def blur(key, image, other):
    """Gaussian, half a pixel to a tenth of the side wide; its weights are normalised anew at the edges."""
    deviation = jax.random.uniform(key, (), minval=0.5, maxval=max(0.8, image.shape[0] / 10))
    place = jnp.arange(image.shape[0])
    weights = jax.nn.softmax(-(((place[:, None] - place) / deviation) ** 2) / 2, axis=-1)
    return jnp.einsum("ih,jw,hwc->ijc", weights, weights, image)


def mixup(key, image, other):
    """A fifth to a half of the other image."""
    return image + jax.random.uniform(key, (), minval=0.2, maxval=0.5) * (other - image)


def noise(key, image, other):
    """Gaussian, of deviation 0.1 to 0.5."""
    level, draw = jax.random.split(key)
    return image + jax.random.uniform(level, (), minval=0.1, maxval=0.5) * jax.random.normal(draw, image.shape)


GREY: dict[str, Augmentation] = {
    "identity": identity,
    "flip": flip,
    "quarter_turn": quarter_turn,
    "rotation": rotation,
    "translation": translation,
    "zoom": zoom,
    "stretch": stretch,
    "cutout": cutout,
    "brightness": brightness,
    "contrast": contrast,
    "blur": blur,
    "mixup": mixup,
    "noise": noise,
}
COLOUR: dict[str, Augmentation] = GREY | {"hue": hue, "saturation": saturation}


def augmentations(channels: int) -> dict[str, Augmentation]:
    """By name, in the order of their labels: 15 of images of 3 channels, 13 of 1, for grey has no hue and no saturation."""
    if channels not in (1, 3):
        raise ValueError(f"found {channels} channels, expected 1 (grey) or 3 (RGB); change config.data.channels")
    return GREY if channels == 1 else COLOUR


def augment(key: Key[Array, ""], image: Image, other: Image, label: Int[Array, ""]) -> Image:
    """The image under augmentation number `label`, clipped to [-1, 1]. Under `vmap` all are computed and one is kept."""
    return jnp.clip(jax.lax.switch(label, list(augmentations(image.shape[-1]).values()), key, image, other), -1, 1)
