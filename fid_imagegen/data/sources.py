"""Where records come from. A source is a list of {"image": uint8 [h, w, c], "label": int32} with a fingerprint.

`make_source(config)` is the only constructor; `SOURCES` is the table it reads.
"""

import functools
import hashlib
import io
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from fid_imagegen.data.captions import CaptionedFiles
from fid_imagegen.data.image_files import ImageFiles
from fid_imagegen.data.shapes import Shapes
from fid_imagegen.data.transforms import decode, upright_size, with_channels
from fid_imagegen.data.webdataset import Prepared


class Source(Protocol):
    """Random access to records; reading is thread-safe and has no state.

    `fingerprint` is a sha256 that changes when the data set does. `num_classes` is 0 for an unlabelled set, whose
    labels are all 0. `sizes` holds the records' heights and widths in pixels, found without decoding pictures.

    A captioned source has one more method, `captions(index) -> tuple[str, ...]`, the texts of a record, one or more,
    read without its pixels; its records hold the same tuple as "captions".
    """

    name: str
    num_classes: int
    fingerprint: str
    sizes: Int[np.ndarray, "n 2"]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, channels] at its own size, "label": np.int32}; IndexError past the end."""


class Arrays:
    """Records held in memory: images uint8 [N, h, w, c], labels integers [N] or None."""

    def __init__(
        self,
        name: str,
        images: UInt8[np.ndarray, "n height width channels"],
        labels: Int[np.ndarray, "n"] | None,
        config,
    ):
        height, width = images.shape[1:3]
        if min(height, width) < config.image_size:
            raise ValueError(
                f"found images of {height}x{width} pixels in {name}, expected a shorter side of at least "
                f"image_size={config.image_size}; lower image_size or enlarge the images"
            )
        self.name, self.images, self.channels = name, images, config.channels
        self.sizes = np.broadcast_to([height, width], (len(images), 2))
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.labels = np.zeros(len(images), np.int32) if labels is None else labels.astype(np.int32)
        digest = hashlib.sha256(f"{images.shape} {labels is not None}".encode())
        digest.update(np.ascontiguousarray(images))
        digest.update(self.labels)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": with_channels(self.images[index], self.channels), "label": self.labels[index]}


class Digits(Arrays):
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 grey; 0..16 becomes round(v * 255 / 16)."""

    def __init__(self, config):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "found no scikit-learn, which holds the images of source 'digits'; install fid_imagegen[demo]"
            ) from error
        digits = load_digits()
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
        super().__init__("digits", images, digits.target, config)


class Npz(Arrays):
    """`path`: an .npz file of `images`, uint8 [N, h, w, c] or [N, h, w], and maybe `labels`, integers [N] from 0."""

    def __init__(self, config):
        path = Path(config.path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"found no .npz file at path={config.path!r}, expected one; set config.data.path")
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise ValueError(
                    f"found arrays {sorted(file)} in {path}, expected 'images'; rename the array of images"
                )
            images, labels = file["images"], file.get("labels")
        shape = images.shape
        if (
            images.dtype != np.uint8
            or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4)))
            or not shape[0]
        ):
            raise ValueError(
                f"found images of {images.dtype} {list(shape)} in {path}, expected uint8 [N, h, w, c] with c in 1, 3, "
                "4 or uint8 [N, h, w], N > 0; convert them before saving"
            )
        if labels is not None and (
            labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0
        ):
            raise ValueError(
                f"found labels of {labels.dtype} {list(labels.shape)} in {path}, expected integers >= 0 of shape "
                f"[{shape[0]}]; fix or leave out `labels`"
            )
        super().__init__(f"npz:{path.name}", images if len(shape) == 4 else images[..., None], labels, config)


class Synthetic:
    """1,024 smooth images, functions of the index, for tests and dry runs: a gradient and blobs, in 10 classes."""

    def __init__(self, config):
        self.name, self.num_classes, self.shape = (
            "synthetic",
            10,
            (config.image_size, config.image_size, config.channels),
        )
        self.sizes = np.broadcast_to(self.shape[:2], (len(self), 2))
        self.fingerprint = hashlib.sha256(f"synthetic 1 {self.shape}".encode()).hexdigest()

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng, label = np.random.default_rng(index), index % self.num_classes
        size, _, channels = self.shape
        y, x = np.meshgrid(*2 * [np.linspace(-1, 1, size)], indexing="ij")
        value = rng.normal(size=(2, channels)) / 4
        image = y[..., None] * value[0] + x[..., None] * value[1]
        # Blobs sit near the class's place on a circle, so that a class is visible.
        angle = 2 * math.pi * label / self.num_classes
        for _ in range(3):
            centre = 0.6 * np.array([math.sin(angle), math.cos(angle)]) + rng.normal(size=2) / 8
            width = rng.uniform(0.15, 0.4)
            blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
            image = image + blob[..., None] * rng.uniform(-1, 1, size=channels)
        pixels = np.round(255 * (np.tanh(image) + 1) / 2).astype(np.uint8)
        return {"image": pixels, "label": np.int32(label)}


class Tfds:
    """`tfds:NAME`, NAME as in `mnist` or `mnist:3.0.1`, prepared in ArrayRecord format in the data_dir `path`.

    An empty `path` is TFDS's own default. `split` may be a slice such as `train[:90%]`. Images are decoded here,
    so that they do not depend on whether OpenCV, TFDS's first choice, is installed. Nothing is downloaded or prepared.
    A set with a sequence `captions` of `text`, as `coco_captions`, is captioned.
    """

    def __init__(self, config):
        import tensorflow_datasets as tfds  # slow to import, and says that tensorflow is missing

        self.name, self.channels = config.source, config.channels
        name = config.source.partition(":")[2]
        try:
            self.records = tfds.data_source(
                name,
                split=config.split,
                data_dir=config.path or None,
                download=False,
                decoders={"image": tfds.decode.SkipDecoding()},
                builder_kwargs={"file_format": "array_record"},
            )
        except Exception as error:  # TFDS raises a dozen types, some with the list of all its sets
            raise ValueError(
                f"found no usable split {config.split!r} of {name!r} under path={config.path!r} "
                f"({str(error).partition(chr(10))[0]}), expected a TFDS set prepared in ArrayRecord format; correct "
                f"the names, or install fid_imagegen[tfds] and run `tfds build {name} --file_format=array_record`"
            ) from error
        info = self.records.dataset_info
        features = dict(info.features.items())
        if not isinstance(features.get("image"), tfds.features.Image):
            raise ValueError(
                f"found features {sorted(features)} in {config.source}, expected an Image named 'image'; "
                "choose another set"
            )
        self.labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
        self.num_classes = features["label"].num_classes if self.labelled else 0
        captions = getattr(features.get("captions"), "feature", None)  # of a sequence
        if isinstance(captions, tfds.features.FeaturesDict) and "text" in captions.keys():  # noqa: SIM118
            self.captions = self._captions
        lengths = {name: split.shard_lengths for name, split in sorted(info.splits.items())}
        self.fingerprint = hashlib.sha256(f"{info.full_name} {lengths} {config.split}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """By the headers of the pictures: TFDS notes no sizes, so that the whole set is read once."""

        def read(index: int) -> tuple[int, int]:
            with Image.open(io.BytesIO(self.records[index]["image"])) as image:
                return upright_size(image)

        with ThreadPoolExecutor() as pool:
            return np.array(list(pool.map(read, range(len(self)))), np.int32)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self.records[index]
        label = np.int32(record["label"] if self.labelled else 0)
        made = {"image": decode(record["image"], self.channels), "label": label}
        return made | {"captions": self._texts(index, record)} if hasattr(self, "captions") else made

    def _captions(self, index: int) -> tuple[str, ...]:
        return self._texts(index, self.records[index])

    def _texts(self, index: int, record) -> tuple[str, ...]:
        texts = tuple(text.decode("utf-8") for text in record["captions"]["text"])
        if not texts:
            raise ValueError(
                f"found no caption in record {index} of {self.name}, expected one or more; choose another set"
            )
        return texts


SOURCES = {
    "captions": CaptionedFiles,
    "digits": Digits,
    "folder": ImageFiles,
    "npz": Npz,
    "prepared": Prepared,
    "shapes": Shapes,
    "synthetic": Synthetic,
    "tfds": Tfds,
}


class Part:
    """Some records of a source: the training or the held-out part."""

    def __init__(self, source: Source, indices: Int[np.ndarray, "n"], part: str):
        self.source, self.indices, self.num_classes = source, indices, source.num_classes
        self.name = f"{source.name} ({part})"
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {part}".encode()).hexdigest()
        if hasattr(source, "captions"):
            self.captions = lambda index: source.captions(int(indices[index]))

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        return self.source.sizes[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.source[int(self.indices[index])]


def _covering(kind: str, config) -> Source:
    if config.buckets or config.resize < config.image_size:
        raise ValueError(
            f"found resize={config.resize} with image_size={config.image_size}, buckets={config.buckets}, expected at least "
            "image_size and no buckets: crops are squares; change config.data"
        )
    whole = config.copy_and_resolve_references()
    whole.image_size = config.resize
    try:
        return SOURCES[kind](whole)
    except ValueError as error:
        raise ValueError(f"{error} (here image_size is config.data.resize)") from error


def make_source(config, *, held_out: bool = False) -> Source:
    """The source that `config.data` describes.

    With `holdout_every` = k > 0, record i of the source is held out when i mod k = k - 1; the result is the held-out
    part (`held_out=True`) or the rest. With k = 0 it is the whole source.

    With `resize` its pictures cover that square instead of `image_size`, and those that are drawn are drawn as large.

    Errors: ValueError for an unknown source, channels other than 1 or 3, a `resize` below `image_size` or with buckets, an
    empty part, or `held_out` with k = 0.
    """
    kind, every = config.source.partition(":")[0], config.holdout_every
    if kind not in SOURCES:
        raise ValueError(f"found source={config.source!r}, expected one of {sorted(SOURCES)} (tfds as tfds:NAME)")
    if config.channels not in (1, 3):
        raise ValueError(f"found channels={config.channels}, expected 1 (grey) or 3 (RGB)")
    if held_out and every == 0:
        raise ValueError(
            "found holdout_every=0 where held-out records are wanted, expected k > 0; set config.data.holdout_every"
        )
    source = _covering(kind, config) if config.resize else SOURCES[kind](config)
    if every == 0:
        return source
    chosen = (np.arange(len(source)) % every == every - 1) == held_out
    part = f"{'held out' if held_out else 'training'}, every {every}"
    if every < 0 or not chosen.any():
        raise ValueError(
            f"found no record for the part '{part}' among {len(source)} of {source.name}, expected at least one; "
            "change config.data.holdout_every"
        )
    return Part(source, np.flatnonzero(chosen), part)
