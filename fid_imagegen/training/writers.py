"""Logs with CLU's method names: JSON lines always, TensorBoard where asked. Only process 0 writes.

`clu.metric_writers` needs tensorflow at import, so the interface is CLU's and the back-ends are ours (tensorboardX).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image


class Writer:
    """`WORKDIR/metrics.jsonl`, `WORKDIR/samples/*.png` and TensorBoard events.

    start: the step the run (re)starts from. Lines after it are dropped, so that the log of a resumed run reads like one run.
    """

    def __init__(self, workdir: str | Path, *, start: int, tensorboard: bool):
        self.directory = Path(workdir)
        self._active = jax.process_index() == 0
        self._board = None
        if not self._active:
            return
        self._path = self.directory / "metrics.jsonl"
        _truncate(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=start + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one JSON line {"step": step, name: value, ...}."""
        if not self._active:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Saves uint8 sheets [height, width, channels] as `samples/NAME_STEP.png`."""
        if not self._active:
            return
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                folder / f"{name}_{step:07d}.png"
            )
            if self._board:
                self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Forces everything to disk."""
        if self._active:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._board:
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            self.flush()
            self._file.close()
            if self._board:
                self._board.close()


def tile(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """One sheet of uint8 images [count, height, width, channels], row by row, a pixel of white between them."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; a last line cut off by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _truncate(path: Path, start: int) -> None:
    """Keeps the lines up to step `start`, atomically."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= start]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
