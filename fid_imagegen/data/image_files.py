"""A folder or a zip of PNG, JPEG and WebP files, as a source."""

import hashlib
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from absl import logging
from PIL import Image

from fid_imagegen.data.transforms import decode, more_than_8_bits, upright_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
MAX_NAMED = 5


class ImageFiles:
    """`path`: a folder, read recursively, or a .zip. Records are in order of their names within their common folder.

    Where every image sits in a sub-folder of that common folder, the first sub-folders' names, sorted, are the classes;
    otherwise the set is unlabelled. Hidden files, such as the forks macOS zips, are passed over. `fingerprint` covers
    the names and sizes of the files, so a folder and a zip of it share one.

    Errors: FileNotFoundError for a missing path; ValueError for a path without images, and for files whose header is
    unreadable, with more than 8 bits per channel, or with a shorter side below `image_size`, unless `skip_unreadable`,
    which leaves them out and logs them. Only headers are read here: pixels that do not decode raise when they are read.
    """

    def __init__(self, config):
        self.path, self.channels = Path(config.path), config.channels
        self.name = f"folder:{self.path.name}"
        if not config.path or not self.path.exists():
            raise FileNotFoundError(
                f"found nothing at path={config.path!r}, expected a folder or a .zip of PNG, JPEG or WebP files; "
                "set config.data.path"
            )
        # One handle and one lock: `ZipFile.open` counts its readers without a lock of its own.
        self.zip, self.lock = None if self.path.is_dir() else _open_zip(self.path), threading.Lock()
        lengths = self._bytes()
        names = sorted(name for name in lengths if name.lower().endswith(SUFFIXES))
        if not names:
            raise ValueError(
                f"found no PNG, JPEG or WebP among {len(lengths)} files of {self.path}, expected names that end in "
                f"{', '.join(SUFFIXES)}; set config.data.path to a folder or a .zip with images"
            )
        usable = self._usable(names, config)
        self.files, self.sizes = list(usable), np.array(list(usable.values()), np.int32)
        common = os.path.commonpath([PurePosixPath(name).parent for name in self.files])
        inner = [PurePosixPath(name).relative_to(common) for name in self.files]
        labelled = all(len(name.parts) > 1 for name in inner)
        self.classes = sorted({name.parts[0] for name in inner}) if labelled else []
        self.num_classes = len(self.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[name.parts[0]] if labelled else 0 for name in inner]
        listing = [(str(name), lengths[file]) for name, file in zip(inner, self.files, strict=True)]
        self.fingerprint = hashlib.sha256(repr(listing).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name = self.files[index]
        try:
            with self._open(name) as file:
                data = file.read()
            pixels = decode(data, self.channels)  # outside a zip's lock, so that threads decode in parallel
        except UNREADABLE as error:
            raise ValueError(
                f"found {name} in {self.path} with a good header but unreadable pixels ({error}), expected a whole "
                "PNG, JPEG or WebP; replace or remove the file"
            ) from error
        return {"image": pixels, "label": np.int32(self.labels[index])}

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        if self.zip is None:
            with open(self.path / name, "rb") as file:
                yield file
        else:
            with self.lock, self.zip.open(name) as file:
                yield file

    def _bytes(self) -> dict[str, int]:
        """{name: bytes} of every file, images or not, but for hidden ones."""
        if self.zip is None:
            found = {p.relative_to(self.path).as_posix(): p.stat().st_size for p in self.path.rglob("*") if p.is_file()}
        else:
            found = {entry.filename: entry.file_size for entry in self.zip.infolist() if not entry.is_dir()}
        return {name: size for name, size in found.items() if not _hidden(name)}

    def _usable(self, names: list[str], config) -> dict[str, tuple[int, int]]:
        """{name: (height, width)} without those that cannot be used; raises on them unless `skip_unreadable`."""

        def inspect(name: str) -> tuple[int, int] | str:
            try:
                with self._open(name) as file, Image.open(file) as image:
                    if more_than_8_bits(image):
                        return f"{name}: pixel mode {image.mode}"
                    height, width = upright_size(image)
            except UNREADABLE as error:
                return f"{name}: unreadable ({error})"
            return f"{name}: {height}x{width} pixels" if min(height, width) < config.image_size else (height, width)

        with ThreadPoolExecutor() as pool:  # headers only: the time goes into waiting for the file system
            found = dict(zip(names, pool.map(inspect, names), strict=True))
        bad = [problem for problem in found.values() if isinstance(problem, str)]
        if not bad:
            return found
        listed = "; ".join(bad[:MAX_NAMED]) + (f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else "")
        summary = (
            f"found {len(bad)} of {len(names)} images in {self.path} unreadable or too small: {listed}; expected 8-bit "
            f"PNG, JPEG or WebP with a shorter side of at least image_size={config.image_size}"
        )
        if not config.skip_unreadable or len(bad) == len(names):
            raise ValueError(
                f"{summary}; fix or remove them, lower image_size, or set config.data.skip_unreadable=True"
            )
        logging.warning("%s; skipped.", summary)
        return {name: size for name, size in found.items() if not isinstance(size, str)}


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"found {path}, which is neither a folder nor a zip ({error}); set config.data.path"
        ) from error


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
