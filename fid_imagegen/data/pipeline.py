"""From a source to batches. The position in the data is the global step and nothing else.

Row r of the batch of step s is example i = s * B + r of an endless sequence. Its record is entry i mod N of the
permutation of epoch i div N, and its random bits are block i of a counter-based generator: both are functions of
(seed, i). So 1, 2 or 4 processes and any restart see the same sequence, and a checkpoint holds one integer and
`source.fingerprint`.

Grain gives random access over steps and prefetching threads. Its own per-record `shuffle`, `random_map` and `batch`
take 10 ms of CPU for 256 digits (0.2.18), 3 of them in the shuffle's C++; `_order` and `_draws` take 0.1 ms.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from fid_imagegen.data.sources import Source
from fid_imagegen.data.transforms import random_flip, resize_and_crop

MEMORY_LIMIT = 2**30  # bytes: decoded records of a set up to this size are kept, in each process
LAST_STEP = 2**40
AUGMENTATION = 2**63  # second key word of the augmentation stream; smaller ones are epochs


def _philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    # Raw Philox bits are stable across NumPy versions; `Generator.permutation` promises no such thing.
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)


@functools.lru_cache(maxsize=4)  # prefetching threads straddle an epoch boundary; 8 bytes per record and entry
def _permutation(seed: int, epoch: int, length: int) -> Int64[np.ndarray, "length"]:
    return _philox(seed, epoch).random_raw(length).argsort(kind="stable")


def _order(seed: int, length: int, first: int, count: int) -> Int64[np.ndarray, "count"]:
    """Source indices of the examples first, ..., first + count - 1 of the endless sequence."""
    epochs, positions = np.divmod(np.arange(first, first + count), length)
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(seed, int(epoch), length)[positions[chosen]]
    return indices


def _draws(seed: int, first: int, count: int) -> UInt64[np.ndarray, "count words"]:
    """Four random 64-bit words for each of those examples; each augmentation reads its own column."""
    return _philox(seed, AUGMENTATION, counter=first).random_raw(4 * count).reshape(count, 4)


def _read(
    source: Source, index: int, size: int
) -> tuple[UInt8[np.ndarray, "size size channels"], np.int32, tuple[str, ...]]:
    record = source[int(index)]
    try:
        return resize_and_crop(record["image"], size), record["label"], record.get("captions", ())
    except ValueError as error:
        error.add_note(f"This was record {index} of {source.name}.")
        raise


class _Records:
    """Decoded, resized records, kept in memory once read when the whole set fits in MEMORY_LIMIT."""

    def __init__(self, source: Source, config):
        self.source, self.size, self.channels = source, config.image_size, config.channels
        self.keep = len(source) * self.size**2 * self.channels <= MEMORY_LIMIT
        if self.keep:  # `empty`: the system gives a page when it is first written
            self.images = np.empty((len(source), self.size, self.size, self.channels), np.uint8)
            self.labels = np.empty(len(source), np.int32)
            self.captions = [()] * len(source)
            self.known = np.zeros(len(source), bool)

    def take(
        self, indices: Int64[np.ndarray, "n"]
    ) -> tuple[UInt8[np.ndarray, "n size size channels"], Int32[np.ndarray, "n"], Sequence[tuple[str, ...]]]:
        if not self.keep:
            images, labels, captions = zip(*(_read(self.source, index, self.size) for index in indices), strict=True)
            return np.stack(images), np.array(labels, np.int32), captions
        for index in indices[~self.known[indices]]:
            # Two threads may read one record: they write the same bytes, and `known` follows them.
            self.images[index], self.labels[index], self.captions[index] = _read(self.source, index, self.size)
            self.known[index] = True
        return self.images[indices], self.labels[indices], [self.captions[index] for index in indices]


def batches(
    source: Source,
    config,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
    tokenize: Callable[[list[str]], dict[str, np.ndarray]] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches `start_step`, `start_step + 1`, ..., without end.

    Yields {"image": uint8 [B/P, S, S, C] in 0..255, "label": int32 [B/P], "index": int64 [B/P], the index in `source`}
    with B = batch_size, P = process_count; process p holds the contiguous rows p B/P, ..., (p + 1) B/P - 1. Each epoch
    is another permutation of the source, and a batch may hold the end of one and the start of the next. The iterator
    has a `close()` that stops its threads; being collected does the same.

    A captioned source adds "caption", an object array of strings [B/P], or in its place the arrays [B/P, ...] that
    `tokenize` makes of them, such as {"tokens", "mask"}; of several captions of a record the example's random bits choose.

    Errors: ValueError when P does not divide B, for a process_index, seed or start_step out of range, or for `tokenize`
    with a source that has no captions.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"found batch_size={batch_size} on {process_count} processes, expected a positive multiple of the number "
            "of processes; change batch_size"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"found process_index={process_index}, expected one of 0..{process_count - 1}")
    if not 0 <= seed < 2**64 or not 0 <= start_step < LAST_STEP:
        raise ValueError(f"found seed={seed}, start_step={start_step}, expected both to be non-negative integers")
    captioned = hasattr(source, "captions")
    if tokenize and not captioned:
        raise ValueError(
            f"found no captions in {source.name}, expected a source that has them; change config.data.source"
        )
    records, rows, flip = _Records(source, config), batch_size // process_count, config.flip

    def batch(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size + process_index * rows
        indices = _order(seed, len(source), first, rows)
        images, labels, captions = records.take(indices)
        draws = _draws(seed, first, rows)
        if flip:
            images = random_flip(images, draws[:, 0])
        made = {"image": images, "label": labels, "index": indices}
        if captioned:
            chosen = [texts[draw % len(texts)] for texts, draw in zip(captions, draws[:, 1].tolist(), strict=True)]
            made |= tokenize(chosen) if tokenize else {"caption": np.array(chosen, object)}
        return made

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(start_step, LAST_STEP).map(batch).to_iter_dataset(options))


def examples(source: Source, config, indices: Sequence[int]) -> UInt8[np.ndarray, "n size size channels"]:
    """The records `indices` of the source, resized and cropped, never augmented: for evaluation and previews."""
    size, channels = config.image_size, config.channels
    images = [_read(source, index, size)[0] for index in indices]
    return np.stack(images) if images else np.zeros((0, size, size, channels), np.uint8)


def to_global(batch: dict[str, np.ndarray], sharding) -> dict:
    """Each process's rows [B/P, ...] as global arrays [B, ...] under `sharding`, a jax Sharding of the first axis."""
    import jax  # only here: reading data needs no accelerator

    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()}
