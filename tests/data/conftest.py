"""Small data sets on disk, each holding the same nine images, and a complete `config.data`."""

import io
import json
import zipfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def config():
    """config(**overrides) -> `config.data` with every key."""

    def make(**overrides):
        made = ConfigDict(
            {
                "source": "digits",
                "path": "",
                "split": "train",
                "image_size": 8,
                "resize": 0,
                "buckets": (),
                "channels": 1,
                "flip": False,
                "holdout_every": 0,
                "skip_unreadable": False,
            }
        )
        made.update({key: str(value) if key == "path" else value for key, value in overrides.items()})
        return made.lock()

    return make


@pytest.fixture
def images():
    """Nine images, uint8 [9, 10, 13, 3]; image i is of class i // 3."""
    return np.random.default_rng(0).integers(0, 256, (9, 10, 13, 3), dtype=np.uint8)


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, images):
    for i, pixels in enumerate(images):
        file = tmp_path / "set" / CLASSES[i // 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels))
    (tmp_path / "set" / "captions.csv").write_text("not an image")
    return tmp_path / "set"


@pytest.fixture
def zipped(tmp_path, folder):
    """The folder as macOS zips it: under a common root, with resource forks beside."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            file.write(path, f"set/{path.relative_to(folder)}")
        file.writestr("__MACOSX/set/bird/._0.png", b"fork")
    return tmp_path / "set.zip"


@pytest.fixture
def npz(tmp_path, images):
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(9) // 3)
    return tmp_path / "set.npz"


@pytest.fixture
def tfds_dir(tmp_path, images):
    """A TFDS set `tiny` of ArrayRecord files, written by hand because TFDS itself prepares with tensorflow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    root = tmp_path / "tfds" / "tiny" / "1.0.0"
    root.mkdir(parents=True)
    writer = ArrayRecordWriter(str(root / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i, pixels in enumerate(images):
        features = {
            "image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[png(pixels)])),
            "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[i // 3])),
        }
        writer.write(tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString())
    writer.close()
    tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    ).save_config(root)
    split = {"name": "train", "numBytes": "1", "shardLengths": ["9"]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path / "tfds"
