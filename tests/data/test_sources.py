"""Sources give the records they were made from, whatever the container, and name what is wrong with bad input."""

import builtins
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fid_imagegen.data.sources import SOURCES, make_source


def records(source):
    return np.stack([source[i]["image"] for i in range(len(source))]), [source[i]["label"] for i in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "zipped", "npz", "tfds_dir"])
def test_same_records_from_every_container(kind, request, config, images):
    name = {"folder": "folder", "zipped": "folder", "npz": "npz", "tfds_dir": "tfds:tiny"}[kind]
    source = make_source(config(source=name, path=request.getfixturevalue(kind), channels=3))
    pixels, labels = records(source)
    np.testing.assert_array_equal(pixels, images)
    assert labels == [i // 3 for i in range(9)] and labels[0].dtype == np.int32
    assert source.num_classes == 3 and len(source.fingerprint) == 64


def test_tfds_split_slice(tfds_dir, config, images):
    whole, part = (
        make_source(config(source="tfds:tiny", path=tfds_dir, channels=3, split=split))
        for split in ("train", "train[3:5]")
    )
    np.testing.assert_array_equal(records(part)[0], images[3:5])
    assert part.fingerprint != whole.fingerprint


def test_folder_and_zip_share_a_fingerprint_that_follows_the_files(folder, zipped, config):
    def fingerprint(path):
        return make_source(config(source="folder", path=path)).fingerprint

    before = fingerprint(folder)
    assert before == fingerprint(zipped)
    (folder / "captions.csv").unlink()
    assert before == fingerprint(folder)
    (folder / "dog" / "8.png").rename(folder / "dog" / "9.png")
    assert before != fingerprint(folder)


@pytest.mark.parametrize("key", ["images", "labels"])
def test_npz_fingerprint_follows_the_bytes(tmp_path, npz, config, key):
    arrays = dict(np.load(npz))
    before = make_source(config(source="npz", path=npz)).fingerprint
    arrays[key].flat[0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    assert make_source(config(source="npz", path=tmp_path / "other.npz")).fingerprint != before


def test_images_beside_sub_folders_are_unlabelled(folder, config):
    shutil.copy(folder / "cat" / "3.png", folder / "3.png")
    source = make_source(config(source="folder", path=folder))
    assert source.num_classes == 0 and set(records(source)[1]) == {0}


def test_zip_reads_from_many_threads(zipped, config, images):
    source = make_source(config(source="folder", path=zipped, channels=3))
    with ThreadPoolExecutor(8) as pool:
        for i, record in zip(list(range(9)) * 40, pool.map(source.__getitem__, list(range(9)) * 40), strict=True):
            np.testing.assert_array_equal(record["image"], images[i])


def test_digits_are_exact(config):
    from sklearn.datasets import load_digits

    source = make_source(config())
    pixels, labels = records(source)
    assert pixels.shape == (1797, 8, 8, 1) and pixels.dtype == np.uint8 and source.num_classes == 10
    np.testing.assert_array_equal(
        pixels[..., 0], [[[round(v * 255 / 16) for v in r] for r in x] for x in load_digits().images]
    )
    np.testing.assert_array_equal(labels, load_digits().target)


def test_synthetic_is_smooth_and_a_function_of_the_index(config):
    made = config(source="synthetic", image_size=16, channels=3)
    first, second = records(make_source(made))[0], records(make_source(made))[0]
    np.testing.assert_array_equal(first, second)
    assert first.shape == (1024, 16, 16, 3) and len(np.unique(first, axis=0)) == 1024
    steps = np.abs(np.diff(first.astype(int), axis=2))
    assert steps.mean() < 10 and first.std() > 25
    with pytest.raises(IndexError):
        make_source(made)[1024]


@pytest.mark.parametrize("every", [2, 10, 1797])
def test_held_out_and_training_parts_split_the_source(config, every):
    whole = make_source(config())
    training, held_out = (make_source(config(holdout_every=every), held_out=part) for part in (False, True))
    assert len(held_out) == 1797 // every and len(training) + len(held_out) == 1797
    chosen = np.arange(1797) % every == every - 1
    np.testing.assert_array_equal(records(held_out)[0], records(whole)[0][chosen])
    np.testing.assert_array_equal(records(training)[0], records(whole)[0][~chosen])
    np.testing.assert_array_equal(records(training)[1], np.array(records(whole)[1])[~chosen])
    assert len({whole.fingerprint, training.fingerprint, held_out.fingerprint}) == 3


def test_files_of_every_kind_become_the_channels_asked_for(tmp_path, config):
    red, clear = (255, 0, 0, 255), (255, 0, 0, 0)
    kinds = {
        "a_grey": Image.new("L", (9, 9), 100),
        "b_rgb": Image.new("RGB", (9, 9), (255, 0, 0)),
        "c_rgba": Image.new("RGBA", (9, 9), red),
        "d_clear": Image.new("RGBA", (9, 9), clear),
        "e_half": Image.new("LA", (9, 9), (0, 51)),
        "f_palette": Image.new("RGB", (9, 9), (255, 0, 0)).convert("P"),
        "g_bits": Image.new("1", (9, 9), 1),
    }
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
    rgb = [(100,) * 3, red[:3], red[:3], (255,) * 3, (204,) * 3, red[:3], (255,) * 3]
    pixels, _ = records(make_source(config(source="folder", path=tmp_path, channels=3)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(rgb)[:, None, None], (7, 9, 9, 3)))
    pixels, _ = records(make_source(config(source="folder", path=tmp_path, channels=1)))
    assert pixels.shape == (7, 9, 9, 1)
    assert pixels[:, 0, 0, 0].tolist() == [100, 76, 76, 255, 204, 76, 255]


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 9, 9, 1), (2, 9, 9, 4)])
def test_npz_arrays_become_the_channels_asked_for(tmp_path, config, shape):
    np.savez(tmp_path / "a.npz", images=np.full(shape, 51, np.uint8))
    source = make_source(config(source="npz", path=tmp_path / "a.npz", channels=3))
    assert source[1]["image"].shape == (9, 9, 3) and source.num_classes == 0 and source[0]["label"] == 0
    # RGBA (51, 51, 51) at alpha 51/255 = 1/5 on white: 51/5 + 255 * 4/5.
    assert source[1]["image"][0, 0, 0] == (round(51 / 5 + 255 * 4 / 5) if shape[-1] == 4 else 51)


def test_exif_orientation_is_applied(tmp_path, config):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left, so on top once upright
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = make_source(config(source="folder", path=tmp_path, channels=3))[0]["image"]
    assert image.shape == (32, 16, 3) and image[:14].min() > 240 and image[18:].max() < 15


# Bad input: what was found, what was expected, what to do.


def test_unusable_files_are_all_counted_and_five_named(folder, config):
    for i in range(4):
        (folder / "cat" / f"broken{i}.png").write_bytes(b"not a png")
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (20, 7)).save(folder / "dog" / "small.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "bird" / "deep.png")
    with pytest.raises(ValueError) as caught:
        make_source(config(source="folder", path=folder))
    message = str(caught.value)
    assert message.startswith(
        f"found 7 of 16 images in {folder} unreadable or too small: bird/deep.png: pixel mode I;16"
    )
    assert "cat/broken0.png: unreadable" in message and "cat/broken3.png" in message and "; and 2 more; " in message
    assert "image_size=8" in message and "skip_unreadable=True" in message


def test_a_file_that_is_too_small_is_named_with_its_size(folder, config):
    Image.new("RGB", (20, 7)).save(folder / "dog" / "small.png")
    with pytest.raises(
        ValueError, match=r"found 1 of 10 images in .*: dog/small.png: 7x20 pixels; expected .* image_size=8"
    ):
        make_source(config(source="folder", path=folder))


@pytest.mark.parametrize("container", ["folder", "zip"])
def test_unusable_files_are_skipped_and_logged_only_if_asked(container, folder, tmp_path, config, images, caplog):
    good = make_source(config(source="folder", path=folder)).fingerprint
    (folder / "bird" / "00.png").write_bytes(b"not a png")
    Image.new("RGB", (20, 7)).save(folder / "dog" / "small.png")
    path = folder if container == "folder" else shutil.make_archive(str(tmp_path / "made"), "zip", folder)
    with pytest.raises(ValueError, match="found 2 of 11 images"):
        make_source(config(source="folder", path=path))
    with caplog.at_level("WARNING"):
        source = make_source(config(source="folder", path=path, channels=3, skip_unreadable=True))
    assert "found 2 of 11 images" in caplog.text and "bird/00.png" in caplog.text and "dog/small.png" in caplog.text
    np.testing.assert_array_equal(records(source)[0], images)
    assert source.fingerprint == good


def test_a_folder_with_nothing_usable_is_an_error_even_if_skipping(tmp_path, config):
    (tmp_path / "a.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match="found 1 of 1 images"):
        make_source(config(source="folder", path=tmp_path, skip_unreadable=True))


def test_pixels_that_do_not_decode_name_the_file(folder, config):
    file = folder / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    source = make_source(config(source="folder", path=folder))
    with pytest.raises(
        ValueError, match=r"found cat/3.png in .* with a good header but unreadable pixels .* replace or remove"
    ):
        source[3]


def test_empty_folder_and_zip(tmp_path, config):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing here")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(
        ValueError,
        match=r"found no PNG, JPEG or WebP among 1 files of .*empty, expected .*\.png, \.jpg, \.jpeg, \.webp; set",
    ):
        make_source(config(source="folder", path=tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"found no PNG, JPEG or WebP among 0 files of .*empty\.zip"):
        make_source(config(source="folder", path=tmp_path / "empty.zip"))


def test_missing_and_wrong_paths(tmp_path, config):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        FileNotFoundError, match=r"found nothing at path=.*nowhere', expected a folder or a .zip .* set config"
    ):
        make_source(config(source="folder", path=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="found nothing at path=''"):
        make_source(config(source="folder"))
    with pytest.raises(
        ValueError, match=r"found .*a.txt, which is neither a folder nor a zip .*; set config.data.path"
    ):
        make_source(config(source="folder", path=tmp_path / "a.txt"))
    for path in (tmp_path / "nowhere.npz", tmp_path / "a.txt", ""):
        with pytest.raises(ValueError, match=r"found no .npz file at path=.*, expected one; set config.data.path"):
            make_source(config(source="npz", path=path))


GOOD = np.zeros((2, 9, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD}, r"found arrays \['x'\] in .*, expected 'images'; rename"),
        ({"images": GOOD.astype(float)}, r"found images of float64 \[2, 9, 9, 3\] in .*, expected uint8 .* convert"),
        ({"images": GOOD[..., :2]}, r"found images of uint8 \[2, 9, 9, 2\]"),
        ({"images": GOOD[:0]}, r"found images of uint8 \[0, 9, 9, 3\]"),
        ({"images": GOOD, "labels": np.zeros(3, int)}, r"found labels of int64 \[3\] in .*, expected .* \[2\]; fix"),
        ({"images": GOOD, "labels": np.zeros(2)}, r"found labels of float64 \[2\]"),
        ({"images": GOOD, "labels": np.array([0, -1])}, r"found labels of int64 \[2\] in .*, expected integers >= 0"),
        ({"images": GOOD[:, :7]}, r"found images of 7x9 pixels in npz:a.npz, expected .* image_size=8; lower"),
    ],
)
def test_bad_npz(tmp_path, config, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        make_source(config(source="npz", path=tmp_path / "a.npz"))


@pytest.mark.parametrize("name", ["tfds:nosuch", "tfds:tiny/nosuch", "tfds:"])
def test_unknown_tfds_set(tfds_dir, config, name):
    with pytest.raises(
        ValueError, match=r"found no usable split 'train' of .*, expected a TFDS set prepared .*\[tfds\]"
    ) as caught:
        make_source(config(source=name, path=tfds_dir))
    assert len(str(caught.value)) < 1000  # TFDS lists its thousand sets


def test_unknown_tfds_split(tfds_dir, config):
    with pytest.raises(ValueError, match=r"found no usable split 'dev' of 'tiny' .*\['train'\]"):
        make_source(config(source="tfds:tiny", path=tfds_dir, split="dev"))


def test_bad_settings(config):
    with pytest.raises(
        ValueError, match=r"found source='digit', expected one of \['captions', .*'tfds'\] \(tfds as tfds:NAME\)"
    ):
        make_source(config(source="digit"))
    with pytest.raises(ValueError, match=r"found channels=2, expected 1 \(grey\) or 3 \(RGB\)"):
        make_source(config(channels=2))
    with pytest.raises(ValueError, match="found images of 8x8 pixels in digits, expected .* image_size=32; lower"):
        make_source(config(image_size=32))
    with pytest.raises(
        ValueError, match="found holdout_every=0 where held-out records are wanted, expected k > 0; set"
    ):
        make_source(config(), held_out=True)
    for every, part in ((1, False), (1798, True), (-3, False), (-3, True)):
        with pytest.raises(
            ValueError, match="found no record for the part .* among 1797 of digits, expected .*; change"
        ):
            make_source(config(holdout_every=every), held_out=part)
    assert sorted(SOURCES) == ["captions", "digits", "folder", "npz", "prepared", "shapes", "synthetic", "tfds"]


def test_digits_without_scikit_learn(config, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"found no scikit-learn, .*; install fid_imagegen\[demo\]"):
        make_source(config())
