"""Pictures of several shapes with static shapes: every record belongs to one bucket, every global batch is of one bucket.

`config.data.buckets` lists (height, width) in pixels; where it is empty there is one bucket, the square of `image_size`.

Which bucket a step is of, and how many steps of that bucket came before it, are functions of the step: a period of steps
repeats without end, in which a bucket's share of the steps is its share of the records.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int, Int64

from fid_imagegen.data.captions import listed

# Steps. A prime, so that what is logged every so many steps meets every place of the period in turn.
PERIOD = 509
TURNS = 2**62 + 2  # second key word of the order within a period, away from those of `pipeline` and `shapes`
LEFT_OUT = -1


def sizes(config) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket of `config.data`.

    Errors: ValueError for what is no pair of whole numbers, for a side below `image_size`, and for two buckets of one
    aspect ratio, of which the second would stay empty.
    """
    if not config.buckets:
        return ((config.image_size, config.image_size),)
    if not all(_is_size(bucket, config.image_size) for bucket in config.buckets):
        raise ValueError(
            f"found buckets {config.buckets} with image_size={config.image_size}, expected pairs (height, width), each side at "
            "least image_size, which previews are cut to; change config.data.buckets or config.data.image_size"
        )
    found = tuple((height, width) for height, width in config.buckets)
    if len({Fraction(*size) for size in found}) < len(found):
        raise ValueError(
            f"found two buckets of one aspect ratio among {found}, expected each once: a record goes to the nearest; "
            "change config.data.buckets"
        )
    return found


def check_multiples(config, step: int, reason: str) -> None:
    """Raises ValueError for a bucket with a side that is no multiple of `step` pixels."""
    if uneven := [size for size in sizes(config) if any(side % step for side in size)]:
        raise ValueError(
            f"found images of {uneven} pixels, expected multiples of {step}: {reason}; change config.data.image_size or "
            "config.data.buckets"
        )


def assigned(source: Any, config) -> Int64[np.ndarray, "records"]:
    """The bucket of every record, an index into `sizes(config)`; LEFT_OUT for a record that is in none.

    It is the bucket of the nearest aspect ratio, in logarithms; of two that are equally near the wider one. The record
    must cover it, since nothing is enlarged; `skip_unreadable` leaves those out that do not.

    Errors: ValueError, which counts and names them otherwise, and where no record is left.
    """
    if not config.buckets:
        return np.zeros(len(source), np.int64)  # a source sees to it that each of its records covers the square
    wanted, found = np.array(sizes(config)), source.sizes
    order = _aspect(wanted).argsort()
    aspects = _aspect(wanted)[order]
    nearest = order[np.searchsorted((aspects[1:] + aspects[:-1]) / 2, _aspect(found))]
    small = (found < wanted[nearest]).any(axis=1)
    if small.all() or (small.any() and not config.skip_unreadable):
        raise ValueError(_too_small(source, found, wanted[nearest], np.flatnonzero(small)))
    return np.where(small, LEFT_OUT, nearest)


def members(source: Any, config) -> list[Int64[np.ndarray, "_"]]:
    """The records of every bucket, in order. Logs what is in none, and the buckets without any. Errors: those of `assigned`."""
    bucket = assigned(source, config)
    found = [np.flatnonzero(bucket == number) for number in range(len(sizes(config)))]
    if left_out := len(source) - sum(map(len, found)):
        logging.warning("%d records of %s are too small for their bucket; skipped.", left_out, source.name)
    if empty := [size for size, records in zip(sizes(config), found, strict=True) if not len(records)]:
        logging.warning("found no records in %s for buckets %s: they are not trained.", source.name, empty)
    return found


class Schedule:
    """Which bucket a step is of, for buckets of `counts` records. One with records has at least one step of a period."""

    def __init__(self, counts: Sequence[int], seed: int):
        drawn = np.random.Philox(key=np.array([seed, TURNS], np.uint64)).random_raw(PERIOD)
        self.turns = _shares(counts)[drawn.argsort(kind="stable")]
        each = self.turns[:, None] == np.arange(len(counts))
        self.steps = each.sum(axis=0)
        self.before = each.cumsum(axis=0)[np.arange(PERIOD), self.turns] - 1

    def __call__(self, step: int) -> tuple[int, int]:
        """(the bucket of a step, how many earlier steps were of it)."""
        periods, place = divmod(step, PERIOD)
        bucket = int(self.turns[place])
        return bucket, periods * int(self.steps[bucket]) + int(self.before[place])


def _shares(counts: Sequence[int]) -> Int64[np.ndarray, "period"]:
    """PERIOD buckets, each as often as its share is, by Huntington and Hill: every one's first step comes before all second."""
    held, steps = np.flatnonzero(counts), np.arange(PERIOD)
    rank = np.sqrt(steps * (steps + 1)) / np.array(counts)[held, None]
    return held[rank.argsort(axis=None, kind="stable")[:PERIOD] // PERIOD]


def _aspect(sizes_N2: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, "n"]:
    return np.log(sizes_N2[:, 0]) - np.log(sizes_N2[:, 1])


def _is_size(bucket: Any, smallest: int) -> bool:
    pair = isinstance(bucket, list | tuple) and len(bucket) == 2
    return pair and all(isinstance(side, int) and side >= smallest for side in bucket)


def _too_small(source: Any, found, wanted, records) -> str:
    names = [f"record {i}: {found[i][0]}x{found[i][1]} for {wanted[i][0]}x{wanted[i][1]}" for i in records]
    return (
        f"found {len(records)} of {len(found)} records of {source.name} too small for their bucket{listed(names)}, expected "
        "every one to cover it, since nothing is enlarged; change config.data.buckets, enlarge or remove them, or set "
        "config.data.skip_unreadable=True"
    )
