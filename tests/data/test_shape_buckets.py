"""Buckets of shapes: which record and which step is of which, and that the position in the data still is the step alone."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fid_imagegen.data import buckets, pipeline
from fid_imagegen.data.sources import make_source
from fid_imagegen.data.transforms import resize_and_crop

WIDE, TALL, SQUARE = (8, 16), (16, 8), (8, 8)
SHAPES = (WIDE, TALL, SQUARE)


class Sized:
    """A source of nothing but sizes."""

    name = "sized"

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def __len__(self):
        return len(self.sizes)


@pytest.fixture
def shaped(tmp_path, config):
    """(source, config) of 60 captioned pictures: 30 wide, 20 tall and 10 square ones."""
    rng, rows = np.random.default_rng(0), ["file,caption"]
    for i in range(60):
        height, width = [(9, 20), (11, 19), (12, 24), (24, 11), (18, 9), (10, 12)][i % 6]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        rows += [f"{i:02d}.png,picture {i}", f"{i:02d}.png,again {i}"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    made = config(source="captions", path=tmp_path, channels=3, buckets=SHAPES, flip=True)
    return make_source(made), made


OF_SIXTY = [0, 0, 0, 1, 1, 2] * 10


def take(steps, source, made, **options):
    """The batches of steps 0 .. steps - 1, or from `start_step` on."""
    iterator = pipeline.batches(source, made, **{"seed": 0, "batch_size": 8, **options})
    found = list(itertools.islice(iterator, steps))
    iterator.close()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# Records


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((8, 16), WIDE),
        ((800, 1600), WIDE),
        ((100, 142), WIDE),  # the border is at the square root of two
        ((100, 141), SQUARE),
        ((100, 100), SQUARE),
        ((141, 100), SQUARE),
        ((142, 100), TALL),
        ((16, 160), WIDE),
    ],
)
def test_a_record_is_of_the_bucket_of_the_nearest_aspect(config, size, bucket):
    assert buckets.assigned(Sized([size]), config(buckets=SHAPES)).tolist() == [SHAPES.index(bucket)]


def test_assignment_is_by_the_smallest_distance(config):
    sizes = np.random.default_rng(0).integers(192, 1000, (500, 2))
    shapes = ((64, 128), (128, 80), (64, 96), (64, 64), (96, 64), (192, 64))
    found = buckets.assigned(Sized(sizes), config(buckets=shapes))
    for (height, width), bucket in zip(sizes, found, strict=True):
        distances = [abs(np.log(height / width) - np.log(h / w)) for h, w in shapes]
        assert distances[bucket] == pytest.approx(min(distances))
    assert len(set(found.tolist())) == len(shapes)


def test_of_two_equally_near_the_wider_one(config):
    for shapes in ((WIDE, TALL), (TALL, WIDE)):
        assert shapes[buckets.assigned(Sized([(20, 20)]), config(buckets=shapes))[0]] == WIDE


def test_without_buckets_there_is_one_and_sizes_are_not_asked_for(config):
    assert buckets.assigned([None] * 3, config()).tolist() == [0, 0, 0]
    assert buckets.sizes(config()) == ((8, 8),)


SMALL = [(9, 17), (9, 15), (8, 8), (12, 9), (15, 9)]  # the second and the last do not cover what is nearest


def test_records_that_do_not_cover_their_bucket_are_counted_and_named(config):
    with pytest.raises(
        ValueError,
        match=r"found 2 of 5 records of sized too small .* \(record 1: 9x15 for 8x16; record 4: 15x9 for 16x8\)",
    ):
        buckets.assigned(Sized(SMALL), config(buckets=SHAPES))


def test_they_are_left_out_and_logged_only_if_asked(config, caplog):
    made = config(buckets=SHAPES, skip_unreadable=True)
    assert buckets.assigned(Sized(SMALL), made).tolist() == [0, buckets.LEFT_OUT, 2, 2, buckets.LEFT_OUT]
    with caplog.at_level("WARNING"):
        assert [list(found) for found in buckets.members(Sized(SMALL), made)] == [[0], [], [2, 3]]
    assert "2 records of sized are too small" in caplog.text and "for buckets [(16, 8)]" in caplog.text
    with pytest.raises(ValueError, match="found 2 of 2 records"):
        buckets.assigned(Sized([SMALL[1], SMALL[4]]), made)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((8, 16), r"found buckets \(8, 16\) with image_size=8, expected pairs \(height, width\)"),
        (((8, 16, 3),), "expected pairs"),
        (((8, 7),), "each side at least image_size"),
        (((8, 16.5),), "expected pairs"),
        (((8, 16), (16, 32)), r"found two buckets of one aspect ratio among \(\(8, 16\), \(16, 32\)\)"),
    ],
)
def test_bad_buckets(config, shapes, message):
    with pytest.raises(ValueError, match=message):
        buckets.sizes(config(buckets=shapes))
    assert buckets.sizes(config(buckets=[[8, 16]])) == ((8, 16),)  # as it comes back from config.json


# Sizes of records


@pytest.mark.parametrize("kind", ["folder", "zipped", "npz", "tfds_dir", "digits", "synthetic", "shapes"])
def test_sizes_are_those_of_the_pictures(kind, request, config, images):
    paths = {"folder": "folder", "zipped": "folder", "npz": "npz", "tfds_dir": "tfds:tiny"}
    path = {"path": request.getfixturevalue(kind)} if kind in paths else {}
    source = make_source(config(source=paths.get(kind, kind), channels=3, holdout_every=2, **path))
    assert np.shape(source.sizes) == (len(source), 2)
    for i in range(3):
        assert tuple(source.sizes[i]) == source[i]["image"].shape[:2]
    if path:
        assert {tuple(size) for size in source.sizes} == {images.shape[1:3]}


def test_sizes_stay_with_their_captioned_pictures(shaped, tmp_path, config):
    lines = (tmp_path / "captions.csv").read_text().split("\n")
    (tmp_path / "captions.csv").write_text("\n".join(line for line in lines if not line.startswith("03")))
    source = make_source(config(source="captions", path=tmp_path, channels=3, skip_unreadable=True))
    assert [tuple(size) for size in source.sizes] == [source[i]["image"].shape[:2] for i in range(59)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_sizes_are_those_of_the_upright_picture(tmp_path, config, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (12, 9)).save(tmp_path / f"a.{suffix}", exif=exif)
    source = make_source(config(source="folder", path=tmp_path))
    assert tuple(source.sizes[0]) == source[0]["image"].shape[:2] == ((12, 9) if orientation > 4 else (9, 12))


def test_sizes_are_read_without_decoding(folder, config, monkeypatch):
    from PIL import ImageFile

    def refuse(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert len(make_source(config(source="folder", path=folder)).sizes) == 9


def test_sizes_of_a_prepared_set(tmp_path, config):
    import tarfile

    from fid_imagegen.data.filters import Filters
    from fid_imagegen.data.webdataset import prepare

    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (width, height) in enumerate([(12, 9), (9, 20), (30, 10)]):
            file = io.BytesIO()
            picture = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height))
            picture.save(file, "jpeg", exif=exif if i == 2 else b"")
            for suffix, data in (("jpg", file.getvalue()), ("txt", b"text")):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    filters = Filters(min_side=8, max_side=99, max_punsafe=1, max_pwatermark=1, min_aesthetic=0)
    prepare([tmp_path / "0.tar"], tmp_path / "out", filters, max_corrupt=0.0)
    source = make_source(config(source="prepared", path=tmp_path / "out", channels=3))
    assert source.sizes.tolist() == [[9, 12], [20, 9], [30, 10]]
    assert [list(source[i]["image"].shape[:2]) for i in range(3)] == source.sizes.tolist()
    (tmp_path / "out" / "sizes.npy").unlink()
    made = config(source="prepared", path=tmp_path / "out", channels=3, buckets=SHAPES)
    assert len(make_source(made)) == 3
    with pytest.raises(FileNotFoundError, match=r"found no sizes.npy in .*out, expected .*prepare the set again"):
        buckets.assigned(make_source(made), made)


# Crops


@pytest.mark.parametrize("shape", [(8, 16), (9, 16), (8, 17), (40, 41), (21, 100), (16, 32), (23, 33)])
def test_a_crop_is_the_centre_of_what_just_covers(shape):
    # Brightness is the place along an axis: after the crop it runs over the centre of what was there, and no more is lost.
    for axis, side in enumerate(shape):
        ramp = np.broadcast_to(np.expand_dims(np.linspace(0, 255, side), (1 - axis, 2)), (*shape, 1)).astype(np.uint8)
        found = resize_and_crop(ramp, WIDE)
        assert found.shape == (8, 16, 1)
        kept = WIDE[axis] / (side * max(8 / shape[0], 16 / shape[1]))  # share of this side
        line = found[4, :, 0] if axis else found[:, 8, 0]
        expected = 255 * (0.5 + kept * ((np.arange(WIDE[axis]) + 0.5) / WIDE[axis] - 0.5))
        step = 255 / side + 255 / WIDE[axis]
        np.testing.assert_allclose(line, expected, atol=step)
        assert np.abs(line.astype(float).mean() - 127.5) < step


def test_a_crop_is_not_enlarged_along_either_side():
    for shape in ((7, 40), (40, 15)):
        with pytest.raises(
            ValueError, match=rf"found an image of {shape[0]}x{shape[1]} pixels, expected at least 8x16"
        ):
            resize_and_crop(np.zeros((*shape, 3), np.uint8), WIDE)


# Steps


@pytest.mark.parametrize("counts", [[7], [1, 10**9], [300, 200, 9], [5, 0, 5], [1, 1, 1, 1]])
def test_shares_of_steps_are_the_shares_of_records(counts):
    schedule = buckets.Schedule(counts, seed=0)
    steps = Counter(schedule(step)[0] for step in range(3 * buckets.PERIOD))
    for bucket, count in enumerate(counts):
        share = buckets.PERIOD * count / sum(counts)
        assert abs(steps[bucket] / 3 - share) <= 1
        assert (steps[bucket] >= 3) == (count > 0)


def test_earlier_steps_of_a_bucket_are_counted():
    schedule, seen = buckets.Schedule([30, 20, 1], seed=3), Counter()
    for step in range(3 * buckets.PERIOD):
        bucket, before = schedule(step)
        assert before == seen[bucket], step
        seen[bucket] += 1


def test_buckets_alternate_and_seeds_differ():
    turns = [[buckets.Schedule([1, 1], seed)(step)[0] for step in range(200)] for seed in (0, 1)]
    for found in turns:
        assert 60 < sum(a != b for a, b in itertools.pairwise(found)) < 140
    assert 60 < sum(a != b for a, b in zip(*turns, strict=True)) < 140
    # What is logged every 50 steps is not always of one bucket.
    schedule = buckets.Schedule([1, 1], 0)
    assert 10 < sum(schedule(step)[0] for step in range(0, 2000, 50)) < 30


# Batches


def test_a_batch_is_of_one_bucket_and_its_rows_are_the_records(shaped):
    source, made = shaped
    for batch in take(30, source, made):
        (bucket,) = {OF_SIXTY[index] for index in batch["index"]}
        assert batch["image"].shape == (8, *SHAPES[bucket], 3)
        for image, index, caption in zip(batch["image"], batch["index"], batch["caption"], strict=True):
            expected = resize_and_crop(source[index]["image"], SHAPES[bucket])
            assert any(np.array_equal(image, one) for one in (expected, expected[:, ::-1]))
            assert caption in source.captions(index)


def test_each_bucket_has_its_own_epochs(shaped):
    orders = {bucket: [] for bucket in range(3)}
    for batch in take(120, *shaped):
        orders[OF_SIXTY[batch["index"][0]]] += batch["index"].tolist()
    for bucket, order in orders.items():
        records = [i for i in range(60) if OF_SIXTY[i] == bucket]
        epochs = [order[i : i + len(records)] for i in range(0, len(order) - len(records), len(records))]
        assert len(epochs) > 3 and all(sorted(epoch) == records for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)
    # Buckets of equally many records are shuffled apart.
    one, other = (pipeline._Order(0, bucket, 1000)(0, 1000) for bucket in (0, 1))
    assert np.mean(one == other) < 0.01


@pytest.mark.parametrize("process_count", [2, 4])
def test_rows_are_the_same_on_any_number_of_processes(shaped, process_count):
    parts = [take(20, *shaped, process_index=p, process_count=process_count) for p in range(process_count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(20, *shaped))


@pytest.mark.parametrize("start_step", [1, 13, 2 * buckets.PERIOD - 3])
def test_a_restart_goes_on_in_the_middle(shaped, start_step):
    first = max(0, start_step - 5)
    whole = take(start_step - first + 8, *shaped, start_step=first)
    assert_same(take(8, *shaped, start_step=start_step), whole[start_step - first :])


def test_memory_and_threads_do_not_change_the_rows(shaped, monkeypatch):
    kept = take(20, *shaped, num_threads=0)
    assert_same(take(20, *shaped, num_threads=8, prefetch=16), kept)
    monkeypatch.setattr(pipeline, "MEMORY_LIMIT", 0)
    assert_same(take(20, *shaped), kept)


def test_random_bits_follow_the_number_of_the_example(shaped):
    source, made = shaped
    for step, batch in enumerate(take(10, source, made)):
        draws = pipeline._draws(0, 8 * step, 8)
        chosen = [source.captions(i)[draw % 2] for i, draw in zip(batch["index"], draws[:, 1].tolist(), strict=True)]
        assert batch["caption"].tolist() == chosen


def test_records_left_out_are_never_read(shaped, config, tmp_path):
    Image.new("RGB", (15, 8)).save(tmp_path / "60.png")
    with (tmp_path / "captions.csv").open("a") as file:
        file.write("\n60.png,small")
    made = config(**shaped[1].to_dict() | {"path": tmp_path})
    with pytest.raises(ValueError, match=r"found 1 of 61 records .* \(record 60: 8x15 for 8x16\)"):
        take(1, make_source(made), made)
    made = config(**made.to_dict() | {"skip_unreadable": True})
    assert_same(take(60, make_source(made), made), take(60, *shaped))


def test_examples_stay_square(shaped):
    assert pipeline.examples(*shaped, [0, 3, 5]).shape == (3, 8, 8, 3)
