"""What frozen encoders make of a source, as records on disk: a folder of ArrayRecord files with features.json beside them.

Record i is record i of the source, a safetensors file of

    latents  float32 [1 or 2, rows, columns, channels]  the compressor's, of the record's crop and, if cached, of its mirror image
    text     bfloat16 [captions, tokens, features]      a frozen text encoder's; absent for one that is trained

and of nothing at all for a record that is in no bucket. Text is most of a record and is only read: with 8 bits of mantissa it is
half as large, and rounded as a network that computes in bfloat16 would round it. Latents are what is learnt: they stay exact.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from fid_imagegen.data.captions import listed
from fid_imagegen.data.webdataset import open_shards

FORMAT, MANIFEST, EMPTY_TEXT = "fid_imagegen.features.1", "features.json", "empty_text.safetensors"
PREPROCESSING = 1  # raised with every change to what transforms or encoders make of a picture or a caption
SHARD = 1024  # records: the most that a killed run has to make again
TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
Record = dict[str, Shaped[np.ndarray, "..."]]


class Features:
    """A folder of `write_features` as a sequence of records; reading is thread-safe and has no state.

    key: what they depend on. empty_text: bfloat16 [tokens, features], None where no text is cached.
    Errors: FileNotFoundError for a folder without features.json, ValueError for another format and for shards that are
    missing or hold another number of records.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"found no {MANIFEST} in {self.folder}, expected a folder of `python -m fid_imagegen.features`; "
                "set config.data.features"
            )
        self.key = _read_json(self.folder / MANIFEST)
        if self.key.get("format") != FORMAT:
            raise ValueError(
                f"found format {self.key.get('format')!r} in {self.folder / MANIFEST}, expected {FORMAT!r}; make them again"
            )
        shards = _shards(self.key["records"], self.key["shard"])
        self._records = open_shards(self.folder, {name: len(part) for name, part in shards.items()})
        self.empty_text = _unpack((self.folder / EMPTY_TEXT).read_bytes())["text"] if self.key["text"] else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _unpack(self._records[index])

    def check(self, wanted: Mapping) -> None:
        """ValueError that names both sides of whatever is not as in the key `wanted`; mirror images may go unused."""
        flip = wanted["flip"] or self.key["flip"]
        remedy = "make the features of this config, or take the data, weights and settings that these were made with"
        _compare(self.key, wanted | {"flip": flip}, self.folder, remedy)


def data_key(config, source) -> dict:
    """What features depend on beside the encoders: the data, and `config.data`."""
    settings = {name: config[name] for name in ("image_size", "channels", "buckets", "flip")}
    return {"preprocessing": PREPROCESSING, "data": source.fingerprint, "records": len(source), **settings}


def write_features(
    out: Path,
    key: Mapping,
    empty_text: Shaped[np.ndarray, "tokens features"] | None,
    encode: Callable[[range], Iterable[Record]],
) -> None:
    """Writes to the folder `out` what `encode` gives for one range of record numbers after another, key["records"] in all.

    key: JSON types, flat; of it "text" says whether there is any. All is written to OUT.partial, which is renamed in the end;
    a killed run leaves its whole shards there, and the same call goes on from them.
    Errors: FileExistsError for `out`, ValueError for an OUT.partial of another key.
    """
    if out.exists():
        raise FileExistsError(f"found {out}, expected a folder that does not exist; choose another --out")
    partial = out.with_name(out.name + ".partial")
    _begin(partial, {"format": FORMAT, "shard": SHARD, **key})
    if empty_text is not None:
        _write_whole(partial / EMPTY_TEXT, lambda path: path.write_bytes(safetensors.numpy.save({"text": empty_text})))
    for name, part in _shards(key["records"], SHARD).items():
        if not (partial / name).exists():
            _write_whole(partial / name, lambda path, part=part: _write_records(path, encode(part)))
    partial.rename(out)


def _shards(records: int, size: int) -> dict[str, range]:
    """The files of a folder, and the numbers of their records."""
    starts = range(0, records, size)
    return {f"{i:06d}.array_record": range(start, min(start + size, records)) for i, start in enumerate(starts)}


def _begin(partial: Path, manifest: dict) -> None:
    if (partial / MANIFEST).exists():
        _compare(_read_json(partial / MANIFEST), manifest, partial, "delete it, or choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    _write_whole(partial / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))


def _write_records(path: Path, records: Iterable[Record]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter  # Linux only

    # One record a group: they are read one by one, at random. Compressed they are 0.8 times as large and read 5 times slower.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(safetensors.numpy.save(record))
    writer.close()


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file of this name is a whole one."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    os.replace(temporary, path)


def _compare(found: Mapping, wanted: Mapping, folder: Path, remedy: str) -> None:
    wanted = json.loads(json.dumps(dict(wanted)))  # as it comes back from a file: tuples are lists there
    differing = [
        f"{name} {found.get(name)!r} there, {wanted[name]!r} here" for name in wanted if found.get(name) != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"found other features in {folder} than are wanted{listed(differing)}, expected the same; {remedy}"
        )


def _unpack(data: bytes) -> Record:
    # `safetensors.numpy.load` knows no bfloat16 (0.8).
    arrays = safetensors.deserialize(data)
    return {name: np.frombuffer(x["data"], TYPES[x["dtype"]]).reshape(x["shape"]) for name, x in arrays}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
