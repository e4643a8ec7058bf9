"""`shapes`: procedural scenes of one or two coloured shapes, with captions that are exactly true, drawn at any size.

A scene lives in the unit square, x to the right and y downwards, and knows no pixels. One thing stands in one of nine
positions; two things stand in one of four relations. Of the 8 x 6 x 9 = 432 combinations of colour, shape and position,
the 216 for which (colour + 3 shape + 5 position) mod 8 < 4, counted in the order of the tables below, are never drawn
for training: each pair of two of the three is in both halves, so that only the combination is new.

Record i is a function of (seed, i), by raw Philox bits as in `pipeline`.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, UInt8

BACKGROUND = (240, 240, 240)
COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 30),
    "green": (40, 160, 60),
    "cyan": (60, 200, 220),
    "blue": (40, 80, 210),
    "purple": (140, 50, 180),
    "black": (30, 30, 30),
}
POSITIONS = {
    "top left": (0.27, 0.27),
    "top": (0.5, 0.27),
    "top right": (0.73, 0.27),
    "left": (0.27, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.73, 0.5),
    "bottom left": (0.27, 0.73),
    "bottom": (0.5, 0.73),
    "bottom right": (0.73, 0.73),
}
SIZES = {"small": 0.12, "medium": 0.16, "large": 0.2}  # the unit shape's radius in image sides
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first to the second
JITTER = 0.03
COUNT, SEED = 2**15, 0
SCENES, PROMPTS = 2**62, 2**62 + 1  # second key words, away from those of `pipeline`
WORDS = 16  # random words per scene

ALONE = (
    "{thing} {place}",
    "{place}, {thing}",
    "there is {thing} {place}",
    "a picture of {thing} {place}",
)
TOGETHER = (
    "{first} {relation} {second}",
    "{first} is {relation} {second}",
    "{second} with {first} {relation} it",
    "a picture of {first} {relation} {second}",
)

Points = Float[np.ndarray, "height width"]


def _polygon(vertices: Sequence[tuple[float, float]]) -> Callable[[Points, Points], Points]:
    """Signed distance to a simple polygon, negative inside."""
    start = np.array(vertices)
    edge = np.roll(start, -1, axis=0) - start

    def distance(x: Points, y: Points) -> Points:
        offset = np.stack([x, y], axis=-1)[..., None, :] - start
        along = np.clip((offset * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
        nearest = np.sqrt(((offset - along[..., None] * edge) ** 2).sum(-1).min(-1))
        return np.where(_inside(offset, edge), -nearest, nearest)

    return distance


def _inside(
    offset: Float[np.ndarray, "height width vertices 2"], edge: Float[np.ndarray, "vertices 2"]
) -> Bool[np.ndarray, "height width"]:
    """Even-odd rule: a ray to the right crosses an odd number of edges."""
    below, next_below = offset[..., 1] >= 0, offset[..., 1] - edge[:, 1] >= 0
    side = offset[..., 0] * edge[:, 1] - offset[..., 1] * edge[:, 0]
    crosses = (below != next_below) & ((side < 0) == (edge[:, 1] > 0))
    return crosses.sum(-1) % 2 == 1


def _star(*radii: float, points: int) -> list[tuple[float, float]]:
    """Vertices at the radii in turn, the first upwards; one radius is the regular polygon."""
    count = points * len(radii)
    angles = (2 * math.pi * k / count for k in range(count))
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, itertools.cycle(radii), strict=False)]


ARM, REACH = 0.33, 1.0
CROSS = [(ARM, -REACH), (ARM, -ARM), (REACH, -ARM), (REACH, ARM), (ARM, ARM), (ARM, REACH)]
SQUARE = 0.85

# Signed distances of the unit shapes. Every centroid is the origin, so that a scorer may align templates by centroids.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": _polygon([(-SQUARE, -SQUARE), (SQUARE, -SQUARE), (SQUARE, SQUARE), (-SQUARE, SQUARE)]),
    "triangle": _polygon(_star(1.15, points=3)),
    "star": _polygon(_star(1.15, 0.5, points=5)),
    "cross": _polygon([*CROSS, *((-x, -y) for x, y in CROSS)]),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.26,
}
EXTENT = 1.2  # all unit shapes lie within this distance of their centre
FINE = 7  # pixels per radius


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape with its centre in the unit square; `position` is "" where a scene tells a relation instead."""

    colour: str
    shape: str
    position: str
    size: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing, or two with the relation of the first to the second, and a caption that says nothing else."""

    things: tuple[Thing, ...]
    relation: str
    caption: str


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
    """The 216 (colour, shape, position) that training never shows, or the 216 that it does."""
    numbered = itertools.product(enumerate(COLOURS), enumerate(SHAPES), enumerate(POSITIONS))
    return [
        (colour, shape, position)
        for (c, colour), (s, shape), (p, position) in numbered
        if ((c + 3 * s + 5 * p) % 8 < 4) == held_out
    ]


TRAINING, HELD_OUT = combinations(held_out=False), combinations(held_out=True)


class _Draws:
    """The random choices of one scene, in order."""

    def __init__(self, seed: int, stream: int, index: int):
        # A Philox counter stands for four words.
        bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=index * WORDS // 4)
        self.words = iter(bits.random_raw(WORDS).tolist())

    def pick(self, options: Sequence):
        return options[next(self.words) % len(options)]

    def jitter(self, width: float) -> float:
        return width * (2 * next(self.words) / 2**64 - 1)


def scene(seed: int, index: int) -> Scene:
    """Training scene `index`: three in four show one thing, of the combinations that are not held out."""
    draws = _Draws(seed, SCENES, index)
    return _together(draws) if draws.pick(range(4)) == 0 else _alone(draws, draws.pick(TRAINING))


def held_out_prompts(count: int) -> list[Scene]:
    """Scenes of `count` different held-out combinations, in a fixed mixed order; `.caption` is the prompt.

    Errors: ValueError for more than the 216 there are.
    """
    if not 0 < count <= len(HELD_OUT):
        raise ValueError(f"found count={count}, expected 1 to {len(HELD_OUT)}, the combinations held out of training")
    order = np.random.Philox(key=np.array([SEED, PROMPTS], np.uint64)).random_raw(len(HELD_OUT)).argsort(kind="stable")
    # Counters from 2^32 on: `order` has used the first ones.
    return [_alone(_Draws(SEED, PROMPTS, 2**32 + i), HELD_OUT[k]) for i, k in enumerate(order[:count].tolist())]


def _alone(draws: _Draws, combination: tuple[str, str, str]) -> Scene:
    colour, shape, position = combination
    x, y = (middle + draws.jitter(JITTER) for middle in POSITIONS[position])
    thing = Thing(colour, shape, position, draws.pick(list(SIZES)), x, y)
    place = f"{'in' if position == 'centre' else 'at'} the {position}"
    return Scene((thing,), "", draws.pick(ALONE).format(thing=_noun(thing, draws), place=place))


def _together(draws: _Draws) -> Scene:
    relation = draws.pick(list(RELATIONS))
    colours = list(COLOURS)
    things = []
    for side in (1, -1):
        # Towards the relation's side by 0.24, anywhere within 0.08 across it.
        x, y = (0.5 + side * 0.24 * along + draws.jitter(JITTER if along else 0.08) for along in RELATIONS[relation])
        # Two different colours, so that a picture says which thing is which; no large ones, so that they do not touch.
        colour = draws.pick(colours)
        colours.remove(colour)
        things.append(Thing(colour, draws.pick(list(SHAPES)), "", draws.pick(["small", "medium"]), x, y))
    first, second = (_noun(thing, draws) for thing in things)
    caption = draws.pick(TOGETHER).format(first=first, second=second, relation=relation)
    return Scene(tuple(things), relation, caption)


def _noun(thing: Thing, draws: _Draws) -> str:
    """ "a small red star", or without its size."""
    words = [thing.size] * draws.pick((0, 1)) + [thing.colour, thing.shape]
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> Float[np.ndarray, "size size"]:
    """How much of each pixel the shape covers, in [0, 1], from the distance of the pixel's centre to its outline.

    Within a few hundredths for a straight outline. Sharp tips need more: where the radius is below 7 pixels, these are
    averages over smaller ones.
    """
    parts = max(1, math.ceil(FINE / (radius * size)))
    fine = parts * size
    rows, columns = (_touched(middle, EXTENT * radius, size) for middle in (y, x))
    centres = (np.arange(fine) + 0.5) / fine
    sub_rows, sub_columns = (slice(parts * pixels.start, parts * pixels.stop) for pixels in (rows, columns))
    grid = np.meshgrid((centres[sub_columns] - x) / radius, (centres[sub_rows] - y) / radius)
    part = np.clip(0.5 - SHAPES[shape](*grid) * radius * fine, 0, 1)
    covered = np.zeros((size, size))
    covered[rows, columns] = reduce(part, "(h a) (w b) -> h w", "mean", a=parts, b=parts)
    return covered


def _touched(middle: float, reach: float, size: int) -> slice:
    """The pixels that middle - reach to middle + reach, and half a pixel more, can touch."""
    first, last = math.floor((middle - reach) * size) - 1, math.ceil((middle + reach) * size) + 1
    return slice(*(min(max(bound, 0), size) for bound in (first, last)))


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The scene on its light background."""
    image = np.tile(np.array(BACKGROUND, np.float64), (size, size, 1))
    for thing in scene.things:
        covered = coverage(thing.shape, thing.x, thing.y, SIZES[thing.size], size)[..., None]
        image += covered * (np.array(COLOURS[thing.colour]) - image)
    return np.round(image).astype(np.uint8)


class Shapes:
    """32,768 training scenes as a captioned, unlabelled source, drawn at `image_size`.

    Errors: ValueError for grey, and for mirrored pictures, whose captions would be false.
    """

    def __init__(self, config):
        if config.channels != 3 or config.flip:
            raise ValueError(
                f"found channels={config.channels}, flip={config.flip} for source 'shapes', expected 3 and False: its "
                "captions name colours and sides; change config.data"
            )
        self.name, self.num_classes, self.size = "shapes", 0, config.image_size
        self.sizes = np.broadcast_to([self.size, self.size], (COUNT, 2))
        self.fingerprint = hashlib.sha256(f"shapes 1 {SEED} {COUNT} {self.size}".encode()).hexdigest()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        made = self._scene(index)
        return {"image": render(made, self.size), "label": np.int32(0), "captions": (made.caption,)}

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._scene(index).caption,)

    def _scene(self, index: int) -> Scene:
        if not 0 <= index < COUNT:
            raise IndexError(index)
        return scene(SEED, index)
