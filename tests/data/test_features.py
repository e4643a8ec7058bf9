"""Cached features: read as written, never half-written under the final name, and chosen by the random bits of pictures."""

import itertools
import json
import re

import ml_dtypes
import numpy as np
import pytest

from fid_imagegen.data import features, pipeline
from fid_imagegen.data.features import Features, write_features

KEY = {"records": 9, "data": "cafe", "buckets": ((8, 8), (8, 12)), "flip": True, "text": {"encoder": "H"}}
EMPTY = np.full((2, 3), -1, ml_dtypes.bfloat16)


def record(index):
    """Latents [2, 1, columns, 1] and text [captions, 2, 3] whose values tell the record, the twin and the caption."""
    latents = np.full((2, 1, 2 + index % 2, 1), 10 * index, np.float32)
    latents[1] += 1 / 3
    text = np.stack([np.full((2, 3), 10 * index + caption) for caption in range(1 + index % 3)])
    return {"latents": latents, "text": text.astype(ml_dtypes.bfloat16)}


def encode(part):
    return map(record, part)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD", 4)


@pytest.fixture
def written(tmp_path, small_shards):
    write_features(tmp_path / "features", KEY, EMPTY, encode)
    return tmp_path / "features"


def test_records_are_read_as_they_were_written(written):
    found = Features(written)
    assert len(found) == 9 and not written.with_name("features.partial").exists()
    for index in (8, 0, np.int64(5), 3):
        for name, array in record(index).items():
            assert found[index][name].dtype == array.dtype
            np.testing.assert_array_equal(found[index][name], array)
    np.testing.assert_array_equal(found.empty_text, EMPTY)
    found.check(KEY)


def test_a_record_may_hold_nothing_and_a_folder_no_text(tmp_path):
    bare = KEY | {"text": None}
    write_features(tmp_path / "bare", bare, None, lambda part: [{} if index == 4 else record(index) for index in part])
    found = Features(tmp_path / "bare")
    assert found.empty_text is None and found[4] == {} and set(found[5]) == {"latents", "text"}


def test_a_killed_run_keeps_its_whole_shards_and_goes_on(tmp_path, small_shards):
    asked, deaths, out = [], [KeyboardInterrupt], tmp_path / "features"

    def dying(part):
        asked.append(part)
        for index in part:
            if index == 6 and deaths:
                raise deaths.pop()
            yield record(index)

    with pytest.raises(KeyboardInterrupt):
        write_features(out, KEY, EMPTY, dying)
    assert not out.exists()
    write_features(out, KEY, EMPTY, dying)
    assert asked == [range(4), range(4, 8), range(4, 8), range(8, 9)]
    found = Features(out)
    assert [float(found[index]["latents"][0, 0, 0, 0]) for index in range(9)] == [10 * index for index in range(9)]
    assert not list(out.glob("*.partial"))


def test_what_was_begun_with_another_key_is_left_alone(tmp_path, small_shards):
    def dying(part):
        if part.start:
            raise KeyboardInterrupt
        return encode(part)

    out, partial = tmp_path / "features", tmp_path / "features.partial"
    with pytest.raises(KeyboardInterrupt):
        write_features(out, KEY, EMPTY, dying)
    before = {file.name: file.read_bytes() for file in partial.iterdir()}
    with pytest.raises(ValueError, match=r"data 'cafe' there, 'beef' here.*delete it, or choose another --out"):
        write_features(out, KEY | {"data": "beef"}, EMPTY, encode)
    assert {file.name: file.read_bytes() for file in partial.iterdir()} == before
    write_features(out, KEY, EMPTY, encode)
    with pytest.raises(FileExistsError, match="choose another --out"):
        write_features(out, KEY, EMPTY, encode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "beef"}, "data 'cafe' there, 'beef' here"),
        ({"records": 10}, "records 9 there, 10 here"),
        ({"buckets": ((8, 8),)}, "buckets [[8, 8], [8, 12]] there, [[8, 8]] here"),
        ({"text": None}, "text {'encoder': 'H'} there, None here"),
        ({"new": 1}, "new None there, 1 here"),
        ({"data": "beef", "records": 10}, "records 9 there, 10 here; data"),
    ],
)
def test_other_features_are_refused_by_name(written, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Features(written).check(KEY | change)


def test_mirror_images_may_go_unused_but_not_be_missing(written, tmp_path):
    Features(written).check(KEY | {"flip": False})
    write_features(tmp_path / "plain", KEY | {"flip": False}, EMPTY, encode)
    with pytest.raises(ValueError, match="flip False there, True here"):
        Features(tmp_path / "plain").check(KEY)


def test_folders_that_are_not_whole_are_refused(written):
    with pytest.raises(FileNotFoundError, match=r"found no features.json in .*expected a folder of `python -m"):
        Features(written.parent)
    shard = written / "000001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"1 of 3 shards .*000001.array_record: unreadable"):
        Features(written)
    shard.write_bytes((written / "000002.array_record").read_bytes())
    with pytest.raises(ValueError, match=r"000001.array_record: 1 records, expected 4"):
        Features(written)
    shard.unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards .*000001"):
        Features(written)
    shard.write_bytes(data)
    manifest = written / "features.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": "fid_imagegen.features.0"}))
    with pytest.raises(
        ValueError, match=r"found format 'fid_imagegen.features.0' .*expected 'fid_imagegen.features.1'"
    ):
        Features(written)


class Captioned:
    """Nine pictures whose top left pixel tells the record, their right half brighter; one to three captions each."""

    name, num_classes, fingerprint = "captioned", 0, "cafe"
    sizes = np.array([(8, 8 + 4 * (index % 2)) for index in range(9)])

    def __len__(self):
        return 9

    def __getitem__(self, index):
        image = np.full((*self.sizes[index], 1), 10 * index, np.uint8)
        image[:, image.shape[1] // 2 :] += 1
        return {"image": image, "label": np.int32(0), "captions": self.captions(index)}

    def captions(self, index):
        return tuple(str(10 * index + caption) for caption in range(1 + index % 3))


def take(count, config, **options):
    iterator = pipeline.batches(Captioned(), config, **{"seed": 3, "batch_size": 4, **options})
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("sizes", [(), ((8, 8), (8, 12))])
def test_cached_batches_are_the_batches_of_pictures(written, config, flip, sizes):
    made, cached = config(flip=flip, buckets=sizes), list(Features(written))
    if not sizes:  # one bucket, one shape
        cached = [each | {"latents": each["latents"][:, :, :2]} for each in cached]
    pictures, found = take(40, made), take(40, made, features=cached)
    seen = set()
    for with_pictures, without in zip(pictures, found, strict=True):
        assert set(without) == {"latents", "text", "index"}
        assert without["latents"].dtype == np.float32 and without["text"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(without["index"], with_pictures["index"])
        corner = with_pictures["image"][:, 0, 0, 0].astype(int)
        mirrored = corner % 10  # the brighter half came first
        np.testing.assert_array_equal(
            without["latents"][:, 0, 0, 0], (corner - mirrored + mirrored * np.float32(1 / 3)).astype(np.float32)
        )
        caption = np.array([float(text) for text in with_pictures["caption"]])
        np.testing.assert_array_equal(without["text"][:, 0, 0], caption.astype(ml_dtypes.bfloat16))
        seen |= {(int(c % 10), int(m)) for c, m in zip(caption, mirrored, strict=True)}
    assert seen == set(itertools.product(range(3), (0, 1) if flip else (0,)))


def test_captions_are_tokenised_where_text_is_not_cached(config):
    plain = config()
    cached = [{"latents": record(0)["latents"]}] * 9
    tokenize = lambda texts: {"tokens": np.array([int(text) for text in texts])}  # noqa: E731
    expected, found = take(5, plain, tokenize=tokenize), take(5, plain, tokenize=tokenize, features=cached)
    for with_pictures, without in zip(expected, found, strict=True):
        assert set(without) == {"latents", "tokens", "index"}
        np.testing.assert_array_equal(without["tokens"], with_pictures["tokens"])


def test_each_process_reads_its_own_rows_and_no_picture(config, written, monkeypatch):
    monkeypatch.delattr(Captioned, "__getitem__")
    asked = []

    class Counting(Features):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    made = config(flip=True, buckets=((8, 8), (8, 12)))
    parts = []
    for process in range(2):
        asked.clear()
        options = {"process_index": process, "process_count": 2, "num_threads": 0}
        parts.append(take(10, made, features=Counting(written), **options))
        assert asked == np.concatenate([batch["index"] for batch in parts[-1]]).tolist()
    for whole, *halves in zip(take(10, made, features=Features(written)), *parts, strict=True):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[name])
