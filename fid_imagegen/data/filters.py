"""Which text-image pairs of the web are kept: Würstchen's thresholds, and near-duplicates by a perceptual hash."""

import dataclasses
from collections import defaultdict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

HASH_SIDE, HASH_FREQUENCIES = 32, 8
BAND = 16  # bits


@dataclasses.dataclass(frozen=True)
class Filters:
    """Sides in pixels; punsafe and pwatermark are probabilities, aesthetic is LAION's predicted score, 0 to 10."""

    min_side: int
    max_side: int
    max_punsafe: float
    max_pwatermark: float
    min_aesthetic: float


# Würstchen's released training code, `WebdatasetFilter` in utils.py. Its `get(...) or 1.0` also drops a pwatermark or
# punsafe of exactly 0; here these pass.
PAPER = Filters(min_side=512, max_side=4096, max_punsafe=0.99, max_pwatermark=0.5, min_aesthetic=5.0)


def refusal(filters: Filters, caption: str, metadata: dict, height: int, width: int) -> str | None:
    """The first reason to drop a pair, or None. `height` and `width` are the stored picture's.

    Sides are also checked before img2dataset's resize, where `original_height` and `original_width` tell them. A missing
    score is the worst there is (punsafe 1, pwatermark 1, aesthetic 0), as in the paper's code: a set without scores
    passes thresholds of 1, 1 and 0.
    """
    before = [metadata.get(key) for key in ("original_height", "original_width")]
    sides = [height, width, *(side for side in before if isinstance(side, int))]
    aesthetic = max(_score(metadata, key, 0.0) for key in ("aesthetic", "AESTHETIC_SCORE"))
    passed = {
        "no caption": bool(caption.strip()),
        "too small": min(sides) >= filters.min_side,
        "too large": max(sides) <= filters.max_side,
        "punsafe": _score(metadata, "punsafe", 1.0) <= filters.max_punsafe,
        "pwatermark": _score(metadata, "pwatermark", 1.0) <= filters.max_pwatermark,
        "aesthetic": aesthetic >= filters.min_aesthetic,
    }
    return next((reason for reason, good in passed.items() if not good), None)


def _score(metadata: dict, key: str, worst: float) -> float:
    value = metadata.get(key)
    return value if isinstance(value, (int, float)) else worst  # a NaN passes no threshold


def perceptual_hash(image: UInt8[np.ndarray, "height width 3"]) -> int:
    """pHash: the signs, against their median, of the 63 lowest frequencies of the image as 32x32 grey pixels."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((HASH_SIDE, HASH_SIDE)), np.float64)
    angle = np.pi / HASH_SIDE * np.outer(np.arange(HASH_FREQUENCIES), np.arange(HASH_SIDE) + 0.5)
    cosines = np.cos(angle)  # the rows of a DCT-II
    low = (cosines @ (grey - grey.mean()) @ cosines.T).ravel()[1:]
    return int("".join("01"[bit] for bit in (low > np.median(low)).astype(int)), 2)


class Duplicates:
    """The hashes seen so far; a hash within 3 of 63 bits of one of them is a duplicate.

    Two hashes that differ in at most 3 bits agree in one of 4 bands: only hashes of one's own bands are compared.
    """

    BANDS, DISTANCE = 4, 3

    def __init__(self):
        self.bands = [defaultdict(list) for _ in range(self.BANDS)]

    def add(self, value: int) -> bool:
        """Whether the hash is new; it is then remembered."""
        keys = [value >> (BAND * band) & (2**BAND - 1) for band in range(self.BANDS)]
        for band, key in zip(self.bands, keys, strict=True):
            if any((value ^ other).bit_count() <= self.DISTANCE for other in band[key]):
                return False
        for band, key in zip(self.bands, keys, strict=True):
            band[key].append(value)
        return True
