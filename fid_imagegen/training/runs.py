"""A work directory as others find it: its resolved `config.json`, and the parameters of its newest checkpoint."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from fid_imagegen.interop.safetensors_io import load_tree, save_tree
from fid_imagegen.training import ema
from fid_imagegen.training.checkpoint import load_groups

TOKENIZER = "tokenizer.json"
# What may change between two starts of one run: where it runs and what it reports, never what it computes.
FREE_KEYS = ("mesh", "sharding", "checkpoint", "log", "profile")


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes `config.json` (process 0), or checks it (all): a work directory belongs to one config, but for FREE_KEYS.

    Raises ValueError listing the keys that differ.
    """
    path = epath.Path(workdir) / "config.json"
    resolved = json.loads(config.to_json())
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {old!r} there, {new!r} now"
            for key, old, new in _differences(stored, resolved)
            if key.split(".")[0] not in FREE_KEYS
        ]
        if differing:
            raise ValueError(
                f"found another config in {path}: {'; '.join(differing[:10])}; expected the same; "
                "resume with that config, or choose a new --workdir"
            )
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(resolved, indent=2) + "\n")


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a text file, or leaves what was there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_params(folder: epath.PathLike, config: ConfigDict, groups: dict[str, Any]) -> None:
    """An exported folder: what `read_params` reads."""
    write_config(folder, config)
    save_tree(epath.Path(folder) / "model.safetensors", groups, {"format": "fid_imagegen.params.1"})


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when all is written, and is removed if it is not.

    Raises FileExistsError where `target` exists.
    """
    if target.exists():
        raise FileExistsError(f"found {target}, expected a folder that does not exist; choose another --out")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _differences(old: Any, new: Any, prefix: str = ""):
    """(key, old, new) of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from _differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}" if prefix else key
            )
    elif old != new:
        yield prefix, old, new


def read_config(folder: epath.PathLike) -> ConfigDict:
    """The resolved config of a work directory or exported folder."""
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"found no {path}, expected a work directory or an exported folder; check the path")
    return ConfigDict(json.loads(path.read_text(encoding="utf-8")))


def read_params(folder: epath.PathLike) -> tuple[ConfigDict, dict[str, Any]]:
    """(config, groups) of a work directory or exported folder (`model.safetensors`).

    Groups are the trained ones (of a work directory the last evaluation EMA) and the statistics beside them.
    """
    config = read_config(folder)
    exported = epath.Path(folder) / "model.safetensors"
    if exported.exists():
        return config, load_tree(exported)[0]
    _, groups = load_groups(folder)
    trained = groups["ema"][ema.name(config.ema_decays[-1])] if config.ema_decays else groups["params"]
    return config, trained | groups["model_state"]
