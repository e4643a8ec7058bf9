"""A folder or a zip of images with captions, as a source; and the texts of any captioned source."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from absl import logging

from fid_imagegen.data.image_files import MAX_NAMED, ImageFiles

TABLES = ("captions.csv", "captions.jsonl")
EXPECTED = f"{TABLES[0]} or {TABLES[1]} with `file` and `caption`, or a .txt beside each image"


class CaptionedFiles(ImageFiles):
    """`ImageFiles` whose records have captions: of captions.csv, of captions.jsonl, or of NAME.txt beside NAME.png.

    The table may lie in any one folder; its column `file` holds names relative to that folder. An image of several rows,
    or of several lines of its .txt, has several captions. `fingerprint` covers the captions too.

    Errors, beside those of `ImageFiles`: ValueError for no or more than one table, a table without `file` and `caption`,
    and images without captions or captions without images, counted and named, unless `skip_unreadable`, which leaves
    them out and logs them.
    """

    def __init__(self, config):
        super().__init__(config)
        self.name = f"captions:{self.path.name}"
        texts = self._texts()
        known = set(self.files)
        captionless = [file for file in self.files if file not in texts]
        imageless = [file for file in texts if file not in known]
        if captionless or imageless:
            self._refuse(captionless, imageless, config.skip_unreadable)
        kept = [i for i, file in enumerate(self.files) if file in texts]
        self.files, self.labels = [self.files[i] for i in kept], [self.labels[i] for i in kept]
        self.sizes = self.sizes[kept]
        self.texts = [tuple(texts[file]) for file in self.files]
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {kept} {self.texts}".encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return super().__getitem__(index) | {"captions": self.texts[index]}

    def captions(self, index: int) -> tuple[str, ...]:
        return self.texts[index]

    def _texts(self) -> dict[str, list[str]]:
        """{image: its captions}, blank ones left out."""
        names = sorted(self._bytes())
        tables = [name for name in names if PurePosixPath(name).name in TABLES]
        beside = [name for name in names if name.lower().endswith(".txt")]
        if len(tables) > 1 or not (tables or beside):
            raise ValueError(
                f"found {', '.join(tables) or 'no captions'} in {self.path}, expected one of: {EXPECTED}; "
                f"{'keep one' if tables else 'add them, or set config.data.source=folder'}"
            )
        pairs = _rows(tables[0], self._read(tables[0])) if tables else self._lines(beside)
        texts = {}
        for file, text in pairs:
            if text.strip():
                texts.setdefault(file, []).append(text.strip())
        return texts

    def _lines(self, beside: list[str]) -> Iterator[tuple[str, str]]:
        """(image, line) of each .txt; one without an image keeps its own name."""
        images = {file.rpartition(".")[0]: file for file in self.files}
        for name in beside:
            for line in self._read(name).split("\n"):
                yield images.get(name.rpartition(".")[0], name), line

    def _read(self, name: str) -> str:
        with self._open(name) as file:
            data = file.read()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"found {name} in {self.path} that is not UTF-8 ({error}); save it as UTF-8") from error

    def _refuse(self, captionless: list[str], imageless: list[str], skip: bool) -> None:
        summary = (
            f"found {len(captionless)} images without captions{listed(captionless)} and {len(imageless)} captions without "
            f"usable images{listed(imageless)} in {self.path}, expected {EXPECTED}"
        )
        if not skip or len(captionless) == len(self.files):
            raise ValueError(f"{summary}; complete or remove them, or set config.data.skip_unreadable=True")
        logging.warning("%s; skipped.", summary)


def texts(source) -> Iterator[str]:
    """Every caption of a captioned source, in order, without reading pixels: for training a tokenizer.

    Errors: ValueError for a source without captions.
    """
    if not hasattr(source, "captions"):
        raise ValueError(
            f"found no captions in {source.name}, expected a captioned source: captions, prepared, shapes, or a tfds set "
            "with captions; set config.data.source"
        )
    for index in range(len(source)):
        yield from source.captions(index)


def _rows(name: str, text: str) -> Iterator[tuple[str, str]]:
    """(image, caption) of a table's rows."""
    folder = PurePosixPath(name).parent
    for number, row in _csv(name, text) if name.endswith(".csv") else _json_lines(text):
        file, caption = (row.get(key) if isinstance(row, dict) else None for key in ("file", "caption"))
        if not is_text(file) or not is_text(caption):
            raise ValueError(
                f"found {str(row)[:200]} in row {number} of {name}, expected strings `file` and `caption` of whole characters; "
                "correct it"
            )
        yield (folder / file).as_posix(), caption


def _csv(name: str, text: str) -> Iterator[tuple[int, dict]]:
    number = 1  # the header's
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
            yield number, row
    except csv.Error as error:
        raise ValueError(
            f"found a row after row {number} of {name} that cannot be read ({error}), expected quotes in pairs; close the "
            "quote that is open there"
        ) from error


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    # `splitlines` also cuts at U+0085 and U+2028, which stand in JSON's strings as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line  # shown by the error of its row


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can also spell half of a pair of surrogates, as in "\\ud83d"."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def listed(names: list[str]) -> str:
    """The first names in brackets, after a space; nothing for none."""
    more = [f"and {len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return f" ({'; '.join([*names[:MAX_NAMED], *more])})" if names else ""
