"""Logs with CLU's method names: JSON lines always, TensorBoard where asked. Only process 0 writes.

`clu.metric_writers` needs tensorflow at import, so the interface is CLU's and the back-ends are ours (tensorboardX).
"""

import io
import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from PIL import Image


class Writer:
    """`WORKDIR/metrics.jsonl`, `WORKDIR/samples/*.png` and TensorBoard events.

    start: the step the run (re)starts from. Lines after it are dropped, so that the log of a resumed run reads like one run.
    """

    def __init__(self, workdir: epath.PathLike, *, start: int, tensorboard: bool):
        self.directory = epath.Path(workdir)
        self._active = jax.process_index() == 0
        self._board = None
        if not self._active:
            return
        self._log = _Log(self.directory / "metrics.jsonl", start)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=start + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one JSON line {"step": step, name: value, ...}."""
        if not self._active:
            return
        values = {name: float(value) for name, value in scalars.items()}
        # JSON has no NaN; the error that ends such a run says what it was.
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._log.append(json.dumps({"step": step} | finite))
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
            png = io.BytesIO()
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(png, "PNG")
            (folder / f"{name}_{step:07d}.png").write_bytes(png.getvalue())
            if self._board:
                self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Forces everything to disk."""
        if self._active:
            self._log.flush()
            if self._board:
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            self.flush()
            self._log.close()
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


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; a last line cut off by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class _Log:
    """A file of JSON lines from which those after step `start` are dropped first, atomically.

    A folder's file grows by a line at once. An object of a bucket cannot grow: it is written anew at each `flush`.
    """

    def __init__(self, path: epath.Path, start: int):
        kept = [json.dumps(line) for line in read_metrics(path.parent) if line["step"] <= start]
        self._path, self._lines = path, kept
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._file = None if "://" in str(path) else path.open("a")

    def append(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def flush(self) -> None:
        if self._file is None:
            self._path.write_text("".join(f"{line}\n" for line in self._lines))
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
