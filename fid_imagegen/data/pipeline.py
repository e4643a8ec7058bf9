"""From a source to batches. The position in the data is the global step and nothing else.

Row r of the batch of step s is example i = s * B + r, whose random bits are block i of a counter-based generator. The
batch is of one bucket of records (see `buckets`; there may be only one), and k steps before it were of that bucket too.
Its record is entry j mod N of the permutation of epoch j div N of the bucket's N records, with j = k * B + r. All this is
a function of (seed, s, r). So 1, 2 or 4 processes and any restart see the same sequence, and a checkpoint holds one
integer and `source.fingerprint`.

Grain gives random access over steps and prefetching threads. Its own per-record `shuffle`, `random_map` and `batch`
take 10 ms of CPU for 256 digits (0.2.18), 3 of them in the shuffle's C++; `_Order` and `_draws` take 0.1 ms.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from fid_imagegen.data import buckets
from fid_imagegen.data.sources import Source
from fid_imagegen.data.transforms import centre_crop, mirrored, random_crops, random_flip, resize_and_crop

MEMORY_LIMIT = 2**30  # bytes: decoded records of a set up to this size are kept, in each process
LAST_STEP = 2**40
AUGMENTATION = 2**63  # second key word of the augmentation stream; smaller ones are epochs


def _philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    # Raw Philox bits are stable across NumPy versions; `Generator.permutation` promises no such thing.
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)


class _Order:
    """The endless sequence of a bucket's records, as places among them: one permutation after another."""

    def __init__(self, seed: int, bucket: int, length: int):
        def permutation(epoch: int) -> Int64[np.ndarray, "length"]:
            return _philox(seed, epoch, counter=bucket << 192).random_raw(length).argsort(kind="stable")

        # Prefetching threads straddle an epoch boundary; 8 bytes per record and entry.
        self.length, self.permutation = length, functools.lru_cache(maxsize=4)(permutation)

    def __call__(self, first: int, count: int) -> Int64[np.ndarray, "count"]:
        """Entries first, ..., first + count - 1."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.length)
        places = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = self.permutation(epoch)[positions[chosen]]
        return places


def _draws(seed: int, first: int, count: int) -> UInt64[np.ndarray, "count words"]:
    """Four random 64-bit words for each of those examples: of the flip, of the caption, and two of the crop."""
    return _philox(seed, AUGMENTATION, counter=first).random_raw(4 * count).reshape(count, 4)


def read(
    source: Source, index: int, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "height width channels"], np.int32, tuple[str, ...]]:
    """(image, label, captions) of a record, the image cut to `size`."""
    record = source[int(index)]
    try:
        return resize_and_crop(record["image"], size), record["label"], record.get("captions", ())
    except ValueError as error:
        error.add_note(f"This was record {index} of {source.name}.")
        raise


class _Records:
    """The records of a bucket, decoded and cut to its size; with `keep` in memory once read."""

    def __init__(
        self, source: Source, indices: Int64[np.ndarray, "n"], size: tuple[int, int], *, channels: int, keep: bool
    ):
        self.source, self.indices, self.size, self.keep = source, indices, size, keep
        if keep:  # `empty`: the system gives a page when it is first written
            self.images = np.empty((len(indices), *size, channels), np.uint8)
            self.labels = np.empty(len(indices), np.int32)
            self.captions = [()] * len(indices)
            self.known = np.zeros(len(indices), bool)

    def take(
        self, places: Int64[np.ndarray, "n"]
    ) -> tuple[UInt8[np.ndarray, "n height width channels"], Int32[np.ndarray, "n"], Sequence[tuple[str, ...]]]:
        if not self.keep:
            images, labels, captions = zip(*map(self._read, places), strict=True)
            return np.stack(images), np.array(labels, np.int32), captions
        for place in places[~self.known[places]]:
            # Two threads may read one record: they write the same bytes, and `known` follows them.
            self.images[place], self.labels[place], self.captions[place] = self._read(place)
            self.known[place] = True
        return self.images[places], self.labels[places], [self.captions[place] for place in places]

    def _read(self, place: int):
        return read(self.source, self.indices[place], self.size)


def _bucketed(source: Source, config) -> list[_Records]:
    """The records of every bucket, kept when the whole set fits in MEMORY_LIMIT."""
    members, sizes = buckets.members(source, config), [2 * (config.resize,)] if config.resize else buckets.sizes(config)
    pixels = sum(len(indices) * math.prod(size) for indices, size in zip(members, sizes, strict=True))
    make = functools.partial(_Records, source, channels=config.channels, keep=pixels * config.channels <= MEMORY_LIMIT)
    return list(map(make, members, sizes))


def _chosen(options: Iterable[Sequence], draws: UInt64[np.ndarray, "count words"]) -> list:
    """One of each example's options, by its random bits."""
    return [several[draw % len(several)] for several, draw in zip(options, draws[:, 1].tolist(), strict=True)]


def _cached(records: Sequence[dict], draws: UInt64[np.ndarray, "count words"], flip: bool) -> dict[str, np.ndarray]:
    """{"latents", maybe "text"} of records of features, mirrored and chosen by the bits that mirror and choose without them."""
    twins = mirrored(draws[:, 0]).astype(int) * flip
    made = {"latents": np.stack([record["latents"][twin] for record, twin in zip(records, twins, strict=True)])}
    if "text" in records[0]:
        made["text"] = np.stack(_chosen([record["text"] for record in records], draws))
    return made


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
    features: Sequence[dict[str, np.ndarray]] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches `start_step`, `start_step + 1`, ..., without end.

    Yields {"image": uint8 [B/P, H, W, C] in 0..255, "label": int32 [B/P], "index": int64 [B/P], the index in `source`}
    with B = batch_size, P = process_count; process p holds the contiguous rows p B/P, ..., (p + 1) B/P - 1. H, W are those
    of the step's bucket, on every process; with `resize` each image is a random crop. Each epoch is another permutation of
    a bucket's records, and a batch may hold the end of one and the start of the next. The iterator has a `close()` that
    stops its threads; being collected does the same.

    A captioned source adds "caption", an object array of strings [B/P], or in its place the arrays [B/P, ...] that
    `tokenize` makes of them, such as {"tokens", "mask"}; of several captions of a record the example's random bits choose.

    With `features`, what is cached of every record (see `features`), nothing is decoded: "latents" [B/P, ...] stand in place
    of "image" and "label", and "text" [B/P, ...], where it is cached, in place of the caption.

    Errors: ValueError when P does not divide B, for a process_index, seed or start_step out of range, for `tokenize` with
    a source that has no captions, and those of `buckets.assigned`.
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
    records, rows, flip = _bucketed(source, config), batch_size // process_count, config.flip
    counts = [len(part.indices) for part in records]
    schedule, orders = buckets.Schedule(counts, seed), [_Order(seed, *pair) for pair in enumerate(counts)]

    def batch(step: int) -> dict[str, np.ndarray]:
        bucket, before = schedule(step)
        part, skipped = records[bucket], process_index * rows
        places = orders[bucket](before * batch_size + skipped, rows)
        indices, draws = part.indices[places], _draws(seed, step * batch_size + skipped, rows)
        if features:
            made = _cached([features[index] for index in indices.tolist()], draws, flip)
            captions = map(source.captions, indices.tolist()) if captioned else ()
        else:
            images, labels, captions = part.take(places)
            images = random_crops(images, draws[:, 2:], config.image_size) if config.resize else images
            made = {"image": random_flip(images, draws[:, 0]) if flip else images, "label": labels}
        if captioned and "text" not in made:
            chosen = _chosen(captions, draws)
            made |= tokenize(chosen) if tokenize else {"caption": np.array(chosen, object)}
        return made | {"index": indices}

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(start_step, LAST_STEP).map(batch).to_iter_dataset(options))


def examples(source: Source, config, indices: Sequence[int]) -> UInt8[np.ndarray, "n size size channels"]:
    """The records `indices` of the source, cut to squares whatever the buckets, never augmented: for evaluation and previews."""
    size, whole = 2 * (config.image_size,), 2 * (config.resize or config.image_size,)
    images = [centre_crop(read(source, index, whole)[0], size) for index in indices]
    return np.stack(images) if images else np.zeros((0, *size, config.channels), np.uint8)


def to_global(batch: dict[str, np.ndarray], sharding) -> dict:
    """Each process's rows [B/P, ...] as global arrays [B, ...] under `sharding`, a jax Sharding of the first axis."""
    import jax  # only here: reading data needs no accelerator

    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()}
