"""The cached features of a run: what they depend on, and how its frozen encoders make them."""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped
from tqdm import tqdm

from fid_imagegen.data import buckets, pipeline
from fid_imagegen.data.features import Record, data_key, write_features
from fid_imagegen.tasks.latent import unit
from fid_imagegen.tasks.text import GROUP, no_text


def feature_key(run) -> dict:
    """What the features of a run depend on: data, settings, weights. JSON types, flat.

    Errors: ValueError for a task that reads none, and for random crops.
    """
    if not hasattr(run.task, "feature_key"):
        raise ValueError(
            f"found features for task {run.config.task!r}, which needs the pictures, expected them for stage_c alone; "
            "leave its config.data.features empty"
        )
    if run.config.data.resize:
        raise ValueError(
            f"found features with resize={run.config.data.resize}, expected 0: every step would crop anew; set "
            "config.data.resize=0"
        )
    weights = {f"{name} weights": digest for name, digest in run.frozen_hashes.items()}
    return data_key(run.config.data, run.source) | run.task.feature_key(run.tokenizer) | weights


def make_features(run, out: Path) -> int:
    """Writes the features of the run's source to the folder `out` as `write_features` does; returns the number of records."""
    key = feature_key(run)
    with tqdm(total=key["records"], desc="encoding", mininterval=1.0) as bar:
        encoder = Encoder(run, bar)
        write_features(out, key, encoder.empty_text(), encoder)
    return key["records"]


class Encoder:
    """A run's frozen encoders: record numbers -> features. `config.batch_size` pictures or captions are encoded at once."""

    def __init__(self, run, bar: tqdm):
        self.run, self.bar, self.has_text = run, bar, GROUP in run.frozen
        self.bucket, self.sizes = buckets.assigned(run.source, run.config.data), buckets.sizes(run.config.data)
        self._compress = jax.jit(lambda groups, images: run.task.compress(groups, unit(images)))
        self._encode = jax.jit(lambda groups, *tokens: run.task.text.encode(groups, *tokens).astype(jnp.bfloat16))

    def __call__(self, part: range) -> list[Record]:
        """Features of the records `part`; none of one that is in no bucket."""
        self.bar.update(part.start - self.bar.n)
        made: list[Record] = [{} for _ in part]
        bucket = self.bucket[part.start : part.stop]
        for number, size in enumerate(self.sizes):
            places = np.flatnonzero(bucket == number)
            features = self._bucket(part.start + places, size)
            for place, record in zip(places, features, strict=True):
                made[place] = record
        return made

    def empty_text(self) -> Shaped[np.ndarray, "tokens features"] | None:
        """What dropped text becomes; None for a run that caches none."""
        if not self.has_text:
            return None
        tokens, _ = self.run.tokenizer([""])
        return self._rows(self._encode, *map(np.asarray, no_text(tokens)))[0]

    def _bucket(self, indices: Int[np.ndarray, "n"], size: tuple[int, int]) -> Iterator[Record]:
        """Features of records of one size. While a batch is encoded the next one is read, and no more: pictures are large."""
        read = functools.partial(pipeline.read, self.run.source, size=size)
        batch = self.run.config.batch_size
        with ThreadPoolExecutor() as pool:
            reading = (pool.map(read, indices[start : start + batch]) for start in range(0, len(indices), batch))
            for records, _next in itertools.pairwise(itertools.chain(reading, [()])):
                for features in self._records(list(records)):
                    yield features
                    self.bar.update()

    def _records(self, records: list) -> Iterator[Record]:
        images, _, captions = zip(*records, strict=True)
        images = np.stack(images)
        twins = [images, images[:, :, ::-1]] if self.run.config.data.flip else [images]
        made = {"latents": np.stack([self._rows(self._compress, twin) for twin in twins], axis=1)}
        if self.has_text:
            texts = self._rows(self._encode, *self.run.tokenizer(list(itertools.chain(*captions))))
            made["text"] = np.split(texts, np.cumsum([len(several) for several in captions])[:-1])
        for values in zip(*made.values(), strict=True):
            yield dict(zip(made, values, strict=True))

    def _rows(self, encode: Callable, *arrays: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n ..."]:
        """What `encode` makes of rows, in batches of one size, the last one filled up with its last row."""
        count, size = len(arrays[0]), self.run.config.batch_size
        made = []
        for start in range(0, count, size):
            rows = [array.take(range(start, start + size), axis=0, mode="clip") for array in arrays]
            made.append(np.asarray(encode(self.run.frozen, *jax.device_put(rows, self.run.batch_sharding))))
        return np.concatenate(made)[:count]
