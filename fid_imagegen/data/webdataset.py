"""img2dataset's WebDataset tars -> a folder of ArrayRecord files, with prepared.json and sizes.npy beside them; and its source.

A record is one line of JSON, {"caption", "name", "punsafe", ...}, then the picture's file as it was in the tar.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt32
from PIL import Image

from fid_imagegen.data.captions import is_text, listed
from fid_imagegen.data.filters import Duplicates, Filters, perceptual_hash, refusal
from fid_imagegen.data.image_files import UNREADABLE
from fid_imagegen.data.transforms import decode

FORMAT, MANIFEST, SIZES = "fid_imagegen.prepared.1", "prepared.json", "sizes.npy"
PICTURES = ("jpg", "jpeg", "png", "webp")
KEPT = ("url", "punsafe", "pwatermark", "aesthetic", "AESTHETIC_SCORE")  # of the metadata, for stricter choices later
SHARD = 4096  # records
CHUNK = 256  # samples that are decoded at once
EARLY = 10_000  # samples below which a high share of corrupt ones may still even out
OPEN = 256  # shards at once: many systems allow a process 1,024 files


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture's file, its caption ("" for none) and img2dataset's metadata; `name` is TAR/KEY."""

    name: str
    picture: bytes
    caption: str
    metadata: dict


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """What could not be read, and why."""

    name: str
    reason: str


def samples(path: Path) -> Iterator[Sample | Corrupt]:
    """The samples of a tar: successive members NAME.jpg, NAME.txt, NAME.json. Damaged stretches are named and passed."""

    def key(entry):
        return None if isinstance(entry, Corrupt) else _split(entry[0])[0]

    for name, entries in itertools.groupby(_members(path), key):
        if name is None:
            yield from entries
        else:
            yield _sample(f"{path.name}/{name}", {_split(member)[1]: data for member, data in entries})


def _split(member: str) -> tuple[str, str]:
    """Key and suffix: the name divides at the first dot of its last part."""
    path = PurePosixPath(member)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)), suffix.lower()


def _sample(name: str, parts: dict[str, bytes]) -> Sample | Corrupt:
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    if picture is None:
        return Corrupt(name, f"no picture among {sorted(parts)}")
    try:
        metadata = json.loads(parts.get("json", b"{}"))
        if not isinstance(metadata, dict):
            raise ValueError(f"a {type(metadata).__name__} in place of a table")
        caption = parts["txt"].decode("utf-8") if "txt" in parts else str(metadata.get("caption") or "")
        if not is_text(caption):
            raise ValueError(f"half a character in {caption[:200]!r}")
    except (ValueError, RecursionError) as error:
        return Corrupt(name, f"unreadable json or txt ({error})")
    return Sample(name, picture, caption, metadata)


def _members(path: Path) -> Iterator[tuple[str, bytes] | Corrupt]:
    """(name, bytes) of each file of a tar.

    `tarfile` ends in silence at a broken header in the middle; with `ignore_zeros` it looks for the next good one, and
    what lies between is reported here.
    """
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        try:
            tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)
        except tarfile.TarError as error:
            yield Corrupt(path.name, f"no tar ({error})")
            return
        while True:
            member = _next(tar, size)
            start = size if member is None else member.offset
            file.seek(end)
            if file.read(start - end).strip(b"\0"):
                yield Corrupt(path.name, f"bytes {end} to {start} are no members of a tar")
            if member is None:
                break
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.offset_data + member.size > size:
                yield Corrupt(f"{path.name}/{member.name}", "cut off by the end of the tar")
                return
            if member.isreg():
                yield member.name, tar.extractfile(member).read()
        if end >= size:
            yield Corrupt(path.name, "no end mark: the tar was cut off between two members")


def _next(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    while True:
        try:
            return tar.next()
        except tarfile.TarError:  # the end within a member, or a good extended header before a broken one
            tar.offset += tarfile.BLOCKSIZE
            if tar.offset >= size:
                return None


@dataclasses.dataclass(frozen=True)
class _Inspected:
    record: bytes
    size: tuple[int, int]  # height, width
    hash: int


def _inspect(sample: Sample | Corrupt, filters: Filters) -> _Inspected | Corrupt | str:
    """A record and what is needed to choose it, or the reason why not. Only what passes the filters is decoded."""
    if isinstance(sample, Corrupt):
        return sample
    try:
        with Image.open(io.BytesIO(sample.picture)) as image:
            width, height = image.size
        reason = refusal(filters, sample.caption, sample.metadata, height, width)
        if reason:
            return reason
        pixels = decode(sample.picture, channels=3)
    except UNREADABLE as error:
        return Corrupt(sample.name, f"unreadable picture ({error})")
    kept = {key: sample.metadata[key] for key in KEPT if key in sample.metadata}
    header = {"caption": sample.caption.strip(), "name": sample.name, **kept}
    record = json.dumps(header).encode() + b"\n" + sample.picture
    return _Inspected(record, pixels.shape[:2], perceptual_hash(pixels))


class _Shards:
    """Writes records to numbered ArrayRecord files."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.writer = folder, "", None
        self.counts, self.digest, self.sizes = {}, hashlib.sha256(), array("I")

    def write(self, record: bytes, size: tuple[int, int]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter  # Linux only

        if self.writer is None or self.counts[self.name] == SHARD:
            self.close()
            self.name = f"{len(self.counts):05d}.array_record"
            # One record a group: records are read one by one, at random.
            self.writer, self.counts[self.name] = ArrayRecordWriter(str(self.folder / self.name), "group_size:1"), 0
        self.writer.write(record)
        self.counts[self.name] += 1
        self.digest.update(hashlib.sha256(record).digest())
        self.sizes.extend(size)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def prepare(tars: Sequence[Path], out: Path, filters: Filters, *, max_corrupt: float) -> dict:
    """Writes the pairs of the tars that pass the filters to the folder `out`; returns what prepared.json holds.

    {"format", "fingerprint", "filters", "read", "kept", "dropped": {reason: count}, "corrupt": [{"name", "reason"}, ...],
    "smallest_side", "shards": {file: records}}; read = kept + dropped + corrupt. Of near-duplicates the first is kept. All is
    written to OUT.partial, which is renamed in the end or removed.

    Errors: FileExistsError for `out`, FileNotFoundError for a missing tar; ValueError for no tar, for more corrupt samples
    than `max_corrupt` of those read, and when nothing is left.
    """
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise FileNotFoundError(f"found no tar{listed(missing)}, expected WebDataset tars of img2dataset; set --tars")
    if out.exists():
        raise FileExistsError(f"found {out}, expected a folder that does not exist; choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        report = _prepare(tars, partial, filters, max_corrupt)
        (partial / MANIFEST).write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _prepare(tars: Sequence[Path], folder: Path, filters: Filters, max_corrupt: float) -> dict:
    shards, seen, dropped, corrupt, read = _Shards(folder), Duplicates(), Counter(), [], 0
    stream = itertools.chain.from_iterable(map(samples, tars))
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(stream, CHUNK)):
            for found in pool.map(lambda sample: _inspect(sample, filters), chunk):
                if isinstance(found, Corrupt):
                    corrupt.append(dataclasses.asdict(found))
                elif isinstance(found, str):
                    dropped[found] += 1
                elif not seen.add(found.hash):
                    dropped["duplicate"] += 1
                else:
                    shards.write(found.record, found.size)
            read += len(chunk)
            _check(corrupt, max(read, EARLY), max_corrupt)
    shards.close()
    _check(corrupt, read, max_corrupt)
    if not shards.counts:
        raise ValueError(
            f"found no pair that passes among {read}: {dict(dropped)}, {len(corrupt)} corrupt; expected at least one. A "
            "missing score counts as the worst: for sets without scores set --max_punsafe=1 --max_pwatermark=1 "
            "--min_aesthetic=0"
        )
    np.save(folder / SIZES, np.array(shards.sizes, np.uint32).reshape(-1, 2))
    return {
        "format": FORMAT,
        "fingerprint": shards.digest.hexdigest(),
        "filters": dataclasses.asdict(filters),
        "read": read,
        "kept": sum(shards.counts.values()),
        "dropped": dict(dropped),
        "corrupt": corrupt,
        "smallest_side": min(shards.sizes),
        "shards": shards.counts,
    }


def _check(corrupt: list[dict], read: int, max_corrupt: float) -> None:
    if len(corrupt) > max_corrupt * read:
        names = [f"{found['name']}: {found['reason']}" for found in corrupt]
        raise ValueError(
            f"found {len(corrupt)} corrupt samples{listed(names)} where {read} were read, expected at most "
            f"{max_corrupt:.2%}; download the tars again, or raise --max_corrupt"
        )


class Prepared:
    """`path`: a folder written by `python -m fid_imagegen.prepare`, as a captioned, unlabelled source.

    Errors: FileNotFoundError for a folder without prepared.json; ValueError for another format, for shards that are
    missing or hold another number of records, and for pictures smaller than `image_size`.
    """

    def __init__(self, config):
        self.folder = folder = Path(config.path)
        self.name, self.num_classes, self.channels = f"prepared:{folder.name}", 0, config.channels
        if not config.path or not (folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"found no {MANIFEST} at path={config.path!r}, expected a folder of `python -m fid_imagegen.prepare`; "
                "set config.data.path"
            )
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"found format {manifest.get('format')!r} in {folder / MANIFEST}, expected {FORMAT!r}; prepare it again"
            )
        if manifest["smallest_side"] < config.image_size:
            raise ValueError(
                f"found pictures with a side of {manifest['smallest_side']} pixels in {folder}, expected at least "
                f"image_size={config.image_size}; lower image_size or prepare with --min_side={config.image_size}"
            )
        self.records, self.fingerprint = open_shards(folder, manifest["shards"]), manifest["fingerprint"]

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        """FileNotFoundError for a folder of before sizes were noted."""
        if not (self.folder / SIZES).is_file():
            raise FileNotFoundError(
                f"found no {SIZES} in {self.folder}, expected one; copy it too, or prepare the set again"
            )
        return np.load(self.folder / SIZES)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        header, picture = self._record(index)
        return {
            "image": decode(picture, self.channels),
            "label": np.int32(0),
            "captions": (header["caption"],),
        }

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._record(index)[0]["caption"],)

    def _record(self, index: int) -> tuple[dict, bytes]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        header, _, picture = self.records[index].partition(b"\n")
        return json.loads(header), picture


class Records:
    """The records of {file: its number of records} in order, by number; reading is thread-safe."""

    def __init__(self, folder: Path, shards: dict[str, int]):
        names = list(shards)
        self.starts = np.cumsum([0, *shards.values()])
        # A shard that is put away while another thread reads it is closed after that.
        self.opened = functools.lru_cache(OPEN)(lambda number: _open(folder / names[number]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> bytes:
        number = int(self.starts.searchsorted(index, side="right")) - 1
        return self.opened(number).read([int(index - self.starts[number])])[0]


def _open(shard: Path):
    from array_record.python.array_record_module import ArrayRecordReader  # Linux only

    # Records are read one by one, at random.
    return ArrayRecordReader(str(shard), options="readahead_buffer_size:0", file_reader_buffer_size=2**15)


def open_shards(folder: Path, shards: dict[str, int]) -> Records:
    """The records of {file: its number of records}; ValueError names files that are not whole."""
    problems = []
    for name, count in shards.items():
        try:
            reader = _open(folder / name)
            found = reader.num_records()
            reader.close()  # tells what opening kept to itself
        except Exception as error:  # the library raises nothing narrower
            problems.append(f"{name}: unreadable ({error})")
        else:
            problems += [f"{name}: {found} records, expected {count}"] if found != count else []
    if problems:
        raise ValueError(
            f"found {len(problems)} of {len(shards)} shards of {folder} incomplete{listed(problems)}; copy the folder again"
        )
    return Records(folder, shards)
