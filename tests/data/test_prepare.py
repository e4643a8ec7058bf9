"""Tars to ArrayRecord: what is dropped, what is damaged, and what comes back is counted, named and bitwise."""

import io
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fid_imagegen.data import webdataset
from fid_imagegen.data.captions import texts
from fid_imagegen.data.filters import PAPER, Duplicates, perceptual_hash, refusal
from fid_imagegen.data.pipeline import batches
from fid_imagegen.data.sources import make_source
from fid_imagegen.data.webdataset import Corrupt, Sample, prepare, samples

GOOD = {"punsafe": 0.01, "pwatermark": 0.1, "AESTHETIC_SCORE": 6.0, "original_width": 900, "original_height": 700}
SMALL = replace(PAPER, min_side=16)


def smooth(seed, size=(24, 32)):
    """A photograph's stand-in: noise of every scale, the coarser the stronger; no two alike."""
    rng, values = np.random.default_rng(seed), np.full((size[1], size[0], 3), 127.5)
    for cells in (2, 4, 8, 16):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        values += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float64) - 127.5) / cells
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def jpeg(image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **{"quality": 95, **options})
    return file.getvalue()


def write_tar(path, entries, *, end=True):
    """A tar as webdataset's TarWriter makes it: extended headers for the times. `entries`: (name, bytes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    data = file.getvalue()
    path.write_bytes(data if end else data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0"))
    return path


def sample(key, seed=None, metadata=GOOD, caption=None):
    picture = jpeg(smooth(key if seed is None else seed))
    text = f"picture {key}, ö" if caption is None else caption
    return [
        (f"{key:09d}.jpg", picture),
        (f"{key:09d}.json", json.dumps({"key": f"{key:09d}", "caption": text, **metadata}).encode()),
        (f"{key:09d}.txt", text.encode()),
    ]


@pytest.fixture
def tar(tmp_path):
    def make(*groups, name="00000.tar", **options):
        return write_tar(tmp_path / name, [entry for group in groups for entry in group], **options)

    return make


# Reading tars


def test_samples_of_a_sound_tar(tar):
    found = list(samples(tar(*map(sample, range(5)))))
    assert [entry.name for entry in found] == [f"00000.tar/{i:09d}" for i in range(5)]
    assert found[3].picture == jpeg(smooth(3)) and found[3].caption == "picture 3, ö"
    assert found[3].metadata["pwatermark"] == 0.1


def test_the_caption_may_stand_in_the_json_alone(tar):
    (found,) = samples(tar(sample(0)[:2]))
    assert found.caption == "picture 0, ö"


def headers(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data, member.size) for member in tar}


def damage(path, start, stop):
    data = bytearray(path.read_bytes())
    data[start:stop] = b"\xa5" * (stop - start)
    path.write_bytes(data)


def names(found):
    return [entry.name for entry in found if isinstance(entry, Sample)]


def test_a_broken_header_loses_its_own_sample_only(tar):
    path = tar(*map(sample, range(4)))
    _, data, _ = headers(path)["000000001.jpg"]
    damage(path, data - 512, data)
    found = list(samples(path))
    assert names(found) == [f"00000.tar/{i:09d}" for i in (0, 2, 3)]
    header, rest = (entry for entry in found if isinstance(entry, Corrupt))
    assert header.name == "00000.tar" and "are no members of a tar" in header.reason
    assert rest == Corrupt("00000.tar/000000001", "no picture among ['json', 'txt']")


def test_a_broken_extended_header_loses_nothing_but_is_named(tar):
    path = tar(*map(sample, range(4)))
    offset, _, _ = headers(path)["000000001.jpg"]
    damage(path, offset, offset + 512)
    found = list(samples(path))
    assert len(names(found)) == 4 and len(found) == 5
    assert found[1].reason == f"bytes {offset} to {offset + 1024} are no members of a tar"


def test_a_truncated_tar_keeps_what_came_before(tar):
    path = tar(*map(sample, range(3)))
    _, data, size = headers(path)["000000002.jpg"]
    os.truncate(path, data + size // 2)
    found = list(samples(path))
    assert names(found) == ["00000.tar/000000000", "00000.tar/000000001"]
    assert found[-1] == Corrupt("00000.tar/000000002.jpg", "cut off by the end of the tar")


@pytest.mark.parametrize("count", [1, 3])
def test_a_tar_cut_between_members_is_noticed(tar, count):
    found = list(samples(tar(*map(sample, range(count)), end=False)))
    assert len(names(found)) == count and "no end mark" in found[-1].reason and len(found) == count + 1


def test_tars_put_one_behind_the_other_are_read_on(tar):
    first, second = tar(sample(0)), tar(sample(1), name="b.tar")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert names(samples(first)) == ["00000.tar/000000000", "00000.tar/000000001"] and len(list(samples(first))) == 2


@pytest.mark.parametrize("content", [b"", b"hello", b"hello" * 1000])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    (found,) = samples(tmp_path / "a.tar")
    assert isinstance(found, Corrupt) and found.name == "a.tar"


def test_bad_members_are_named(tar):
    cases = [
        [("a.jpg", b"x"), ("a.json", b"{broken")],
        [("b.jpg", b"x"), ("b.json", b"[1]")],
        [("c.jpg", b"x"), ("c.txt", b"\xff")],
        [("d.txt", b"text")],
        [("e.jpg", b"x"), ("e.json", rb'{"caption": "half \ud83d"}')],
        [("f.jpg", b"x"), ("f.json", b"[" * 100_000)],
    ]
    found = list(samples(tar(*cases)))
    assert all(isinstance(entry, Corrupt) for entry in found)
    assert [entry.name for entry in found] == [f"00000.tar/{key}" for key in "abcdef"]
    assert "json" in found[0].reason and "a list" in found[1].reason and "no picture among ['txt']" in found[3].reason
    assert "half a character" in found[4].reason and "unreadable json" in found[5].reason


def test_samples_of_half_a_character_and_of_endless_tables_are_counted_and_skipped(tar, tmp_path):
    half = sample(1)
    half[1:] = [("000000001.json", rb'{"caption": "half \ud83d"}')]
    endless = sample(2)
    endless[1] = ("000000002.json", b"[" * 100_000)
    report = prepare([tar(sample(0), half, endless, sample(3))], tmp_path / "out", SMALL, max_corrupt=0.5)
    assert report["read"] == 4 and report["kept"] == 2
    assert [found["name"] for found in report["corrupt"]] == ["00000.tar/000000001", "00000.tar/000000002"]


# Filters


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"punsafe": 0.99, "pwatermark": 0.5, "AESTHETIC_SCORE": 5.0}, None),  # thresholds are inclusive
        ({"punsafe": 0.991}, "punsafe"),
        ({"pwatermark": 0.51}, "pwatermark"),
        ({"AESTHETIC_SCORE": 4.99}, "aesthetic"),
        ({"AESTHETIC_SCORE": None, "aesthetic": 5.5}, None),  # either name
        ({"punsafe": None}, "punsafe"),
        ({"pwatermark": float("nan")}, "pwatermark"),
        ({"AESTHETIC_SCORE": "high"}, "aesthetic"),
        ({"punsafe": 0, "pwatermark": 0.0}, None),  # the released code's `or 1.0` would drop it
        ({"original_width": 511}, "too small"),
        ({"original_height": 4097}, "too large"),
        ({"original_height": 4096, "original_width": 512}, None),
        ({"original_height": None}, None),
    ],
)
def test_the_paper_s_thresholds(change, expected):
    assert refusal(PAPER, "text", GOOD | change, 512, 600) == expected


def test_the_stored_picture_counts_too():
    assert refusal(PAPER, "text", GOOD, 511, 600) == "too small"
    assert refusal(PAPER, "text", GOOD, 512, 4097) == "too large"
    assert refusal(PAPER, " \n", GOOD, 512, 600) == "no caption"
    free = replace(PAPER, max_punsafe=1, max_pwatermark=1, min_aesthetic=0)
    assert refusal(free, "text", {}, 512, 600) is None and refusal(PAPER, "text", {}, 512, 600) == "punsafe"


def distance(a, b):
    hashes = [perceptual_hash(np.asarray(image.convert("RGB"))) for image in (a, b)]
    return (hashes[0] ^ hashes[1]).bit_count()


def test_the_hash_ignores_what_an_eye_does():
    same, other = [], []
    for seed in range(20):
        image = smooth(seed, (200, 150))
        again = Image.open(io.BytesIO(jpeg(image, quality=60)))
        larger = image.resize((400, 300), Image.Resampling.LANCZOS)
        same += [distance(image, edited) for edited in (again, larger, image.filter(ImageFilter.GaussianBlur(1)))]
        other.append(distance(image, smooth(seed + 100, (200, 150))))
    # Of 250 photographs of Caltech-101 one edit in a thousand is beyond 3 bits, and no two photographs are within 13.
    assert np.mean(np.array(same) <= 3) > 0.9 and min(other) > 10
    assert perceptual_hash(np.full((9, 9, 3), 77, np.uint8)) == perceptual_hash(np.full((40, 9, 3), 201, np.uint8)) == 0


def test_near_duplicates_are_all_found():
    rng, seen = np.random.default_rng(0), Duplicates()
    values = rng.integers(0, 2**63, 300).tolist()
    assert all(seen.add(value) for value in values)
    for value in values:
        for bits in range(4):
            assert not seen.add(value ^ flips(rng, bits))
    assert all(seen.add(value ^ flips(rng, 4)) for value in values)


def flips(rng, bits):
    return sum(1 << int(bit) for bit in rng.choice(63, bits, replace=False))


# The whole way


def test_pairs_come_back_bitwise_with_counts(tar, tmp_path, config):
    bad = GOOD | {"punsafe": 1.0}
    first = tar(sample(0), sample(1, metadata=bad), sample(2, caption=" "), sample(3))
    second = tar(
        sample(4, seed=0),  # the picture of 0
        sample(5, metadata=GOOD | {"AESTHETIC_SCORE": 1, "url": "u"}),
        sample(6, metadata=GOOD | {"url": "http://x", "exif": "long"}),
        name="00001.tar",
    )
    report = prepare([first, second], tmp_path / "out", SMALL, max_corrupt=0.0)
    assert report["read"] == 7 and report["kept"] == 3 and report["corrupt"] == []
    assert report["dropped"] == {"punsafe": 1, "no caption": 1, "duplicate": 1, "aesthetic": 1}
    assert report["filters"]["min_side"] == 16 and report["smallest_side"] == 24
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]

    made = config(source="prepared", path=tmp_path / "out", channels=3, image_size=24)
    source = make_source(made)
    assert list(texts(source)) == [f"picture {i}, ö" for i in (0, 3, 6)] and source.num_classes == 0
    for i, key in enumerate((0, 3, 6)):
        expected = np.asarray(Image.open(io.BytesIO(jpeg(smooth(key)))))
        np.testing.assert_array_equal(source[i]["image"], expected)
        assert source[i]["captions"] == source.captions(i) and source[i]["label"] == 0
    header, picture = source._record(2)
    assert picture == jpeg(smooth(6)) and header["name"] == "00001.tar/000000006"
    assert header["url"] == "http://x" and "exif" not in header and header["AESTHETIC_SCORE"] == 6.0
    with pytest.raises(IndexError):
        source[3]
    iterator = batches(source, made, seed=0, batch_size=6)
    batch = next(iterator)
    iterator.close()
    assert {text: batch["index"].tolist().count(i) for i, text in enumerate(texts(source))} == dict.fromkeys(
        texts(source), 2
    )


def test_many_shards_and_chunks_are_the_same_records_in_order(tar, tmp_path, config, monkeypatch):
    path = tar(*map(sample, range(10)))
    whole = prepare([path], tmp_path / "a", SMALL, max_corrupt=0.0)
    monkeypatch.setattr(webdataset, "SHARD", 4)
    monkeypatch.setattr(webdataset, "CHUNK", 3)
    parts = prepare([path], tmp_path / "b", SMALL, max_corrupt=0.0)
    assert parts["shards"] == {"00000.array_record": 4, "00001.array_record": 4, "00002.array_record": 2}
    assert parts["fingerprint"] == whole["fingerprint"]
    found = [list(texts(make_source(config(source="prepared", path=tmp_path / name)))) for name in "ab"]
    assert found[0] == found[1] == [f"picture {i}, ö" for i in range(10)]


def test_the_fingerprint_follows_the_records(tar, tmp_path):
    found = {
        prepare([tar(sample(0), sample(key, **change))], tmp_path / name, SMALL, max_corrupt=0.0)["fingerprint"]
        for name, key, change in (("a", 1, {}), ("b", 2, {"seed": 1}), ("c", 1, {"seed": 3}), ("d", 1, {}))
    }
    assert len(found) == 3


# Damage and bad input: counted, named, passed over up to a share, and nothing half-written.


def damaged(tar):
    broken = sample(20)
    broken[0] = (broken[0][0], broken[0][1][:200])
    return tar(*map(sample, range(18)), broken, [("x.txt", b"lost")])


def test_corrupt_samples_are_named_and_passed_over_up_to_a_share(tar, tmp_path):
    path = damaged(tar)
    report = prepare([path], tmp_path / "out", SMALL, max_corrupt=0.1)
    assert report["kept"] == 18 and report["read"] == 20
    assert [found["name"] for found in report["corrupt"]] == ["00000.tar/000000020", "00000.tar/x"]
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) + len(report["corrupt"])


def test_too_many_corrupt_samples_are_an_error_and_leave_nothing(tar, tmp_path):
    with pytest.raises(
        ValueError, match=r"found 2 corrupt samples \(00000.tar/000000020: unreadable .*; 00000.tar/x: "
    ):
        prepare([damaged(tar)], tmp_path / "out", SMALL, max_corrupt=0.099)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_a_hopeless_run_ends_early(tar, tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "EARLY", 10)
    monkeypatch.setattr(webdataset, "CHUNK", 4)
    lost = [[(f"{i}.txt", b"text")] for i in range(8)]
    with pytest.raises(ValueError, match=r"found 4 corrupt samples .* where 10 were read"):
        prepare([tar(*lost, *map(sample, range(100, 130)))], tmp_path / "out", SMALL, max_corrupt=0.3)


def test_an_interruption_leaves_nothing(tar, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("of a run that was killed")
    monkeypatch.setattr(webdataset._Shards, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([tar(sample(0))], tmp_path / "out", SMALL, max_corrupt=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_nothing_left_says_why(tar, tmp_path):
    with pytest.raises(ValueError, match=r"found no pair that passes among 2: \{'too small': 2\}.*--max_punsafe=1"):
        prepare([tar(sample(0), sample(1))], tmp_path / "out", PAPER, max_corrupt=0.0)


def test_missing_tars_and_present_folders(tar, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no tar, expected .*; set --tars"):
        prepare([], tmp_path / "out", SMALL, max_corrupt=0.0)
    with pytest.raises(FileNotFoundError, match=r"found no tar \(nowhere.tar\)"):
        prepare([tar(sample(0)), Path("nowhere.tar")], tmp_path / "out", SMALL, max_corrupt=0.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"found .*out, expected a folder that does not exist"):
        prepare([tar(sample(0))], tmp_path / "out", SMALL, max_corrupt=0.0)


def test_bad_prepared_folders(tar, tmp_path, config):
    def source(**changes):
        return make_source(config(**{"source": "prepared", "path": tmp_path / "out", **changes}))

    for path in ("", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"found no prepared.json at path=.*; set config.data.path"):
            source(path=path)
    prepare([tar(sample(0))], tmp_path / "out", SMALL, max_corrupt=0.0)
    with pytest.raises(ValueError, match=r"a side of 24 pixels in .* image_size=25; lower .* --min_side=25"):
        source(image_size=25)
    shard, manifest = tmp_path / "out" / "00000.array_record", tmp_path / "out" / "prepared.json"
    manifest.write_text(manifest.read_text().replace('array_record": 1', 'array_record": 2'))
    with pytest.raises(
        ValueError, match=r"found 1 of 1 shards .* incomplete \(00000.array_record: 1 records, expected 2"
    ):
        source()
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"incomplete \(00000.array_record: unreadable"):
        source()
    shard.unlink()
    with pytest.raises(ValueError, match=r"incomplete \(00000.array_record: unreadable"):
        source()
    manifest.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"found format 'other' in .*, expected 'fid_imagegen.prepared.1'"):
        source()


def test_any_number_of_shards_needs_few_descriptors(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    numbers, start = range(300), 0
    shards = {f"{number}.array_record": 1 + number % 2 for number in numbers}
    for name, count in shards.items():
        writer = ArrayRecordWriter(str(tmp_path / name), "group_size:1")
        for index in range(start, start := start + count):
            writer.write(str(index).encode())
        writer.close()
    records = webdataset.open_shards(tmp_path, shards)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(start), 3))
    with ThreadPoolExecutor(8) as pool:  # shards are put away while others read them
        assert list(pool.map(records.__getitem__, order)) == [str(index).encode() for index in order]
    assert len(records) == start
    files = [os.readlink(file.path) for file in os.scandir("/proc/self/fd") if os.path.exists(file.path)]
    assert 0 < sum(file.startswith(str(tmp_path)) for file in files) <= 256


def test_the_command(tar, tmp_path):
    tar(sample(0), sample(1, metadata=GOOD | {"pwatermark": 0.9}), [("x.txt", b"lost")])
    command = [sys.executable, "-m", "fid_imagegen.prepare", f"--tars={tmp_path}/*.tar", f"--out={tmp_path}/out"]
    run = subprocess.run([*command, "--min_side=16"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stderr.startswith("error: found 1 corrupt samples (00000.tar/x: no picture")
    run = subprocess.run([*command, "--min_side=16", "--max_corrupt=0.5"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert lines[:4] == ["3 samples of 1 tars", "1 kept", "1 pwatermark", "1 corrupt"]
    assert lines[4].startswith("corrupt: 00000.tar/x: no picture") and (tmp_path / "out" / "prepared.json").is_file()
