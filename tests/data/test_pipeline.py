"""The sequence of examples is a function of (seed, step * B + row): not of processes, restarts, threads or memory."""

import gc
import itertools
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from configs import wuerstchen
from fid_imagegen.data import pipeline, sources
from fid_imagegen.data.sources import make_source


@pytest.fixture
def digits(config):
    made = config(flip=True)
    return make_source(made), made


def take(count, source, config, **options):
    """The next `count` batches, stacked: {"image": [count, B/P, S, S, C], ...}."""
    iterator = pipeline.batches(source, config, **{"seed": 0, "batch_size": 64, **options})
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return {key: np.stack([batch[key] for batch in found]) for key in found[0]}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def test_shapes_and_types(digits):
    batch = take(1, *digits)
    assert {key: (value.shape[1:], value.dtype.name) for key, value in batch.items()} == {
        "image": ((64, 8, 8, 1), "uint8"),
        "label": ((64,), "int32"),
        "index": ((64,), "int64"),
    }


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("start_step", [0, 25])
def test_same_sequence_on_any_number_of_processes(digits, process_count, start_step):
    # 1797 records in batches of 64: steps 28 and 56 hold the end of one epoch and the start of the next.
    expected = take(35, *digits, start_step=start_step)
    parts = [
        take(35, *digits, start_step=start_step, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    assert_equal({key: np.concatenate([part[key] for part in parts], axis=1) for key in expected}, expected)


@pytest.mark.parametrize("start_step", [1, 28, 41])
def test_restart_continues_bitwise(digits, start_step):
    whole = take(45, *digits)
    assert_equal(
        take(45 - start_step, *digits, start_step=start_step), {key: value[start_step:] for key, value in whole.items()}
    )


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 8, "prefetch": 16}])
def test_threads_do_not_change_the_sequence(digits, options):
    assert_equal(take(40, *digits, **options), take(40, *digits))


def test_batch_size_does_not_change_the_sequence_of_examples(digits):
    small, large = take(64, *digits, batch_size=32), take(16, *digits, batch_size=128)
    assert_equal(
        *({key: value.reshape(-1, *value.shape[2:]) for key, value in found.items()} for found in (small, large))
    )


def test_records_not_kept_in_memory_are_the_same(digits, monkeypatch):
    kept = take(40, *digits)
    monkeypatch.setattr(pipeline, "MEMORY_LIMIT", 0)
    assert_equal(take(40, *digits), kept)


def test_kept_records_are_read_once(config):
    made = config(source="synthetic")
    source = make_source(made)
    reads = []
    counting = type("Counting", (type(source),), {"__getitem__": lambda s, i: reads.append(i) or source[i]})(made)
    take(80, counting, made, num_threads=0)  # five epochs
    assert sorted(reads) == list(range(1024))


def test_each_epoch_is_another_permutation_of_every_record(digits):
    order = take(57, *digits)["index"].ravel()
    first, second = order[:1797], order[1797:3594]
    np.testing.assert_array_equal(np.sort(first), np.arange(1797))
    np.testing.assert_array_equal(np.sort(second), np.arange(1797))
    # Two unrelated permutations agree in one place on average.
    for pair in ((first, second), (first, np.arange(1797)), (second, np.arange(1797))):
        assert np.mean(pair[0] == pair[1]) < 0.01


def mirrored(source, made, batch):
    """[examples] whether each was flipped; every image is its record or the mirror image of it."""
    found, plain = batch["image"].reshape(-1, 8, 8, 1), pipeline.examples(source, made, batch["index"].ravel())
    same, flipped = ((found == other).all((1, 2, 3)) for other in (plain, plain[:, :, ::-1]))
    assert (same | flipped).all()
    return flipped & ~same


def test_seeds_differ_in_order_and_in_flips(config):
    made = config(source="synthetic", flip=True)
    source = make_source(made)
    first, second = (take(10, source, made, seed=seed) for seed in (0, 1))
    assert np.mean(first["index"] == second["index"]) < 0.02
    assert 0.4 < np.mean(mirrored(source, made, first) == mirrored(source, made, second)) < 0.6


def test_images_are_the_records_of_their_indices_and_half_are_mirrored(digits, config):
    source, made = digits
    batch = take(20, source, made)
    np.testing.assert_array_equal(batch["label"], [[source[i]["label"] for i in row] for row in batch["index"]])
    assert 0.4 < np.mean(mirrored(source, made, batch)) < 0.6
    plain = config(flip=False)
    assert not mirrored(source, plain, take(20, source, plain)).any()


def test_a_record_is_mirrored_anew_in_each_epoch(config):
    made = config(source="synthetic", flip=True)
    batch = take(2, make_source(made), made, batch_size=1024)
    first, second = (batch["image"][e][np.argsort(batch["index"][e])] for e in range(2))
    assert 0.4 < np.mean((first == second).all((1, 2, 3))) < 0.6


def test_a_source_smaller_than_a_batch(folder, config):
    made = config(source="folder", path=folder, channels=3)
    order = take(3, make_source(made), made, batch_size=12)["index"].reshape(4, 9)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(9), (4, 1)))


def test_large_images_are_resized_and_cropped(folder, config, images):
    made = config(source="folder", path=folder, channels=3)
    found = pipeline.examples(make_source(made), made, [4, 0])
    assert found.shape == (2, 8, 8, 3) and found.dtype == np.uint8
    batch = take(1, make_source(made), made, batch_size=9)
    np.testing.assert_array_equal(batch["image"][0][np.argsort(batch["index"][0])][[4, 0]], found)
    assert pipeline.examples(make_source(made), made, []).shape == (0, 8, 8, 3)


class Captioned(sources.Npz):
    def captions(self, index):
        return ("one", "two")

    def __getitem__(self, index):
        return super().__getitem__(index) | {"captions": self.captions(index)}


@pytest.fixture
def places(tmp_path, config, monkeypatch):
    """Five pictures of 11x14 whose pixels are (row, column, record); 8x8 crops of their middle 11x11, and whole ones."""
    monkeypatch.setitem(sources.SOURCES, "npz", Captioned)
    rows, columns = np.indices((11, 14))
    images = np.stack([np.stack([rows, columns, np.full_like(rows, i)], axis=-1) for i in range(5)])
    np.savez(tmp_path / "set.npz", images=images.astype(np.uint8))
    made = [config(source="npz", path=tmp_path / "set.npz", channels=3, flip=True, resize=r) for r in (11, 0)]
    return [(make_source(each), each) for each in made]


def test_crops_are_whole_squares_of_their_records_at_every_place(places):
    cropped, whole = (take(30, *each) for each in places)
    np.testing.assert_array_equal(cropped["index"], whole["index"])
    images = cropped["image"].reshape(-1, 8, 8, 3).astype(int)
    tops, lefts, flipped = images[:, 0, 0, 0], images[:, 0].min(1)[:, 1], images[:, 0, 0, 1] > images[:, 0, 1, 1]
    upright = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    for image, top, left, index in zip(upright, tops, lefts, cropped["index"].ravel(), strict=True):
        grid = np.indices((8, 8)) + np.array([top, left])[:, None, None]
        np.testing.assert_array_equal(image, np.stack([*grid, np.full_like(grid[0], index)], axis=-1))
    # 16 places in the middle 11 of 14 columns, mirrored or not, with either caption: 30 of the 1,920 examples each.
    drawn = np.stack([tops, lefts - 1, flipped, cropped["caption"].ravel() == "two"], axis=-1)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, list(itertools.product(range(4), range(4), range(2), range(2))))
    assert counts.min() > 10
    # The bits that mirror and that choose captions are those of whole pictures.
    np.testing.assert_array_equal(cropped["caption"], whole["caption"])
    twins = whole["image"].reshape(-1, 8, 8, 3).astype(int)
    np.testing.assert_array_equal(flipped, twins[:, 0, 0, 1] > twins[:, 0, -1, 1])


@pytest.mark.parametrize("limit", [0, pipeline.MEMORY_LIMIT])
def test_crops_are_the_same_on_any_number_of_processes_after_a_restart_and_in_memory(places, limit, monkeypatch):
    expected = take(12, *places[0])
    monkeypatch.setattr(pipeline, "MEMORY_LIMIT", limit)
    parts = [take(8, *places[0], start_step=4, process_index=p, process_count=2) for p in range(2)]
    found = {key: np.concatenate([part[key] for part in parts], axis=1) for key in expected}
    assert_equal(found, {key: value[4:] for key, value in expected.items()})


def test_examples_are_the_centre_of_what_is_cropped(places):
    (cropped, made), _ = places
    found = pipeline.examples(cropped, made, [3])
    assert found.shape == (1, 8, 8, 3)
    assert found[0, 0, 0].tolist() == [1, 2, 3] and found[0, -1, -1].tolist() == [8, 9, 3]


def test_what_is_drawn_is_drawn_to_be_cropped_in_stage_a():
    published, local = (wuerstchen.get_config(arg).stage_a.data for arg in ("", "runlocal"))
    assert (published.image_size, published.resize) == (128, 256)
    source = make_source(local)
    assert source[0]["image"].shape == (96, 96, 3)
    assert take(1, source, local, batch_size=4)["image"].shape == (1, 4, 64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": 7}, "found resize=7 with image_size=8, buckets=.*, expected at least image_size"),
        ({"resize": 8, "buckets": ((8, 8),)}, r"found resize=8 .*buckets=\(\(8, 8\),\), expected .* no buckets"),
        (
            {"resize": 9},
            r"found images of 8x8 pixels in digits, .*image_size=9; .*\(here image_size is config.data.resize",
        ),
    ],
)
def test_crops_that_cannot_be(config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_source(config(**changes))


def test_to_global(digits):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    rows = {key: value[0] for key, value in take(1, *digits).items()}
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    found = pipeline.to_global(rows, NamedSharding(mesh, PartitionSpec("data")))
    assert all(isinstance(value, jax.Array) for value in found.values()) and found["image"].dtype == np.uint8
    assert_equal({key: np.asarray(value) for key, value in found.items()}, rows)


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_threads_and_memory_end_with_the_iterator(config, how):
    made = config(source="synthetic")
    source, before = make_source(made), threads()
    iterator, watch = pipeline.batches(source, made, seed=0, batch_size=8), weakref.ref(source)
    next(iterator)
    mine = threads() - before
    assert mine
    if how == "closed":
        iterator.close()
    del iterator, source
    gc.collect()
    for thread in mine:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in mine)
    gc.collect()
    assert watch() is None


def test_an_open_iterator_does_not_hold_up_the_end_of_the_program():
    program = """
from types import SimpleNamespace
from fid_imagegen.data import pipeline, sources
config = SimpleNamespace(source="synthetic", image_size=8, resize=0, buckets=(), channels=1, flip=True, holdout_every=0)
iterator = pipeline.batches(sources.make_source(config), config, seed=0, batch_size=8)
next(iterator)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_unreadable_record_names_its_file(folder, config):
    made = config(source="folder", path=folder)
    file = folder / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="found cat/3.png"):
        take(2, make_source(made), made, batch_size=9)


def test_bad_settings(digits):
    for batch_size in (65, 0, -2):
        with pytest.raises(
            ValueError, match=f"found batch_size={batch_size} on 2 processes, expected .*; change batch_size"
        ):
            take(1, *digits, batch_size=batch_size, process_count=2)
    with pytest.raises(ValueError, match=r"found process_index=2, expected one of 0..1"):
        take(1, *digits, process_index=2, process_count=2)
    for options in ({"seed": -1}, {"start_step": -1}):
        with pytest.raises(ValueError, match="expected both to be non-negative"):
            take(1, *digits, **options)
