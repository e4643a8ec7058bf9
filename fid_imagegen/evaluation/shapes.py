"""Does a picture show the scene that was asked for? A judge of `data.shapes` pictures, by program and without training.

Things are the connected parts that differ from the background. A thing's colour is the nearest of the table to its
median pixel, its shape the template of equal area and centroid with the largest overlap, its position that of its
centroid.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from fid_imagegen.data.shapes import COLOURS, POSITIONS, RELATIONS, SHAPES, Scene, coverage

CONTRAST = 70.0  # RGB distance from the background at which a pixel belongs to a thing; the palette's least is 185
SMALLEST = 0.005  # of the image: the smallest thing of `data.shapes` covers 0.024
TEMPLATE = 512


class Found(NamedTuple):
    """A thing in a picture; x and y are its centroid in the unit square."""

    colour: str
    shape: str
    x: float
    y: float


def find(image: UInt8[np.ndarray, "size size 3"]) -> list[Found]:
    """The things in a picture, the largest first."""
    pixels = image.astype(np.float64)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    mask = np.linalg.norm(pixels - background, axis=-1) > CONTRAST
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(parts.ravel())[1:]
    large = [part for part in np.argsort(-areas, kind="stable") + 1 if areas[part - 1] >= SMALLEST * mask.size]
    return [_describe(pixels, background, parts == part, mask) for part in large]


def _describe(
    pixels: Float[np.ndarray, "size size 3"],
    background: Float[np.ndarray, "3"],
    part: Bool[np.ndarray, "size size"],
    mask: Bool[np.ndarray, "size size"],
) -> Found:
    size = len(part)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    inner = part & (contrast >= np.median(contrast[part]))  # the outline's pixels are mixtures
    colour = np.median(pixels[inner], axis=0)
    # Soft coverage: how far a pixel lies on the way from the background to the thing's colour.
    way = colour - background
    near = ndimage.binary_dilation(part, np.ones((3, 3)), iterations=max(1, size // 32)) & ~(mask & ~part)
    covered = near * np.clip((pixels - background) @ way / (way @ way), 0, 1)
    area, centres = covered.sum(), (np.arange(size) + 0.5) / size
    x, y = covered.sum(0) @ centres / area, covered.sum(1) @ centres / area

    def overlap(shape: str) -> float:
        template = coverage(shape, x, y, np.sqrt(area / AREAS[shape]) / size, size)
        return np.minimum(covered, template).sum() / np.maximum(covered, template).sum()

    nearest = min(COLOURS, key=lambda name: np.linalg.norm(colour - COLOURS[name]))
    return Found(nearest, max(SHAPES, key=overlap), float(x), float(y))


# Of the unit shapes, measured on a large picture.
AREAS = {shape: coverage(shape, 0.5, 0.5, 0.25, TEMPLATE).sum() / (0.25 * TEMPLATE) ** 2 for shape in SHAPES}


def judge(image: UInt8[np.ndarray, "size size 3"], scene: Scene) -> dict[str, bool]:
    """Whether each of {"colour", "shape", "position", "all"} is as asked for, for every thing of the scene.

    The position of two things is their relation. They are taken in the order in which more colours and shapes are
    right. Where fewer things are found all is wrong; where more are found the largest count, but "all" is wrong.
    """
    asked, found = scene.things, find(image)
    if len(found) < len(asked):
        return dict.fromkeys(("colour", "shape", "position", "all"), False)

    def right(order: Sequence[Found]) -> dict[str, bool]:
        pairs = list(zip(asked, order, strict=True))
        return {
            "colour": all(thing.colour == seen.colour for thing, seen in pairs),
            "shape": all(thing.shape == seen.shape for thing, seen in pairs),
            "position": _position(order) == (scene.relation or asked[0].position),
        }

    def agreement(order: Sequence[Found]) -> int:
        return sum(
            (thing.colour == seen.colour) + (thing.shape == seen.shape)
            for thing, seen in zip(asked, order, strict=True)
        )

    verdict = right(max(itertools.permutations(found[: len(asked)]), key=agreement))
    return verdict | {"all": all(verdict.values()) and len(found) == len(asked)}


def _position(order: Sequence[Found]) -> str:
    """The nearest of the nine positions of one thing; the relation of the first of two to the second."""
    if len(order) == 1:
        return min(
            POSITIONS, key=lambda name: np.hypot(order[0].x - POSITIONS[name][0], order[0].y - POSITIONS[name][1])
        )
    first, second = order
    across, down = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda name: RELATIONS[name][0] * across + RELATIONS[name][1] * down)


def score(images: UInt8[np.ndarray, "n size size 3"], scenes: Sequence[Scene]) -> dict[str, float]:
    """Mean accuracies {"colour", "shape", "position", "all"} of pictures of the scenes, in the same order."""
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return {key: float(np.mean([verdict[key] for verdict in verdicts])) for key in verdicts[0]}
