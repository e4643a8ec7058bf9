"""Checkpoints of a work directory: state, EMAs, optimizer and data position as one atomic unit. All of Orbax is in this file.

A checkpoint is `WORKDIR/checkpoints/STEP/{state,meta}`; the step is the position in the data, `meta` holds the fingerprints
of the data set and of the frozen groups, and the state's checksum. Orbax writes beside and renames, so that a directory named
by a number is whole, and a killed save leaves nothing that would be read.
"""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from fid_imagegen.training.checksum import checksum

STATE, META, CHECKSUM = "state", "meta", "checksum"


class Checkpoints:
    """The checkpoints of one work directory. `save` returns while writing goes on; `close` waits for it."""

    def __init__(self, workdir: epath.PathLike, *, keep: int):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._checksum = jax.jit(checksum)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing `state` as checkpoint `step`; a checkpoint that exists is left as it is."""
        if step in self._manager.all_steps():
            return
        meta = meta | {CHECKSUM: int(self._checksum(state))}
        items = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), META: ocp.args.JsonSave(meta)})
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in the background."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for writes and releases the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
        """The newest readable checkpoint as (state, meta), laid out as the shardings of `abstract_state`; None if there is none.

        Unreadable ones after it are reported and moved aside as `unreadable-STEP`. If none can be read, nothing is moved and
        RuntimeError says why: the fault may lie in the reader, and starting over would throw work away.
        """
        reasons = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, reason = self._read(step, abstract_state)
            # All processes go on from one step, so that one that cannot read it decides for all.
            if not _anywhere(found is None):
                self._set_aside(reasons)
                return found
            reasons[step] = reason
        if reasons:
            raise RuntimeError(
                f"found no readable checkpoint in {self.directory} ({'; '.join(f'{s}: {r}' for s, r in reasons.items())}), "
                "expected one; repair the files, or delete the directory to start over"
            )
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[tuple[Any, dict] | None, str]:
        """((state, meta), "") of a checkpoint, or (None, why it cannot be read)."""
        items = {STATE: ocp.args.StandardRestore(abstract_state), META: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            meta = dict(restored[META])
            _compare(meta.pop(CHECKSUM), int(self._checksum(restored[STATE])))
            return (restored[STATE], meta), ""
        except Exception as error:  # noqa: BLE001  whatever a damaged file makes the readers raise
            return None, _brief(error)

    def _set_aside(self, reasons: dict[int, str]) -> None:
        for step, reason in reasons.items():
            target = self.directory / f"unreadable-{step}"
            logging.error("checkpoint %d cannot be read (%s): moved to %s, using the one before", step, reason, target)
            if jax.process_index() == 0:
                target.rmtree(missing_ok=True)
                (self.directory / str(step)).rename(target)
        if reasons:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("unreadable checkpoints")
            self._manager.reload()

    def _guard(self, write) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"found a failed checkpoint write in {self.directory} ({str(error).strip().splitlines()[-1][:300]}), expected "
                "free and writable space; free some and run the same command again: earlier checkpoints are whole"
            ) from error


def _compare(saved: int, found: int) -> None:
    if saved != found:
        raise ValueError(f"found checksum {found:08x} of what was read, expected {saved:08x}: the files were altered")


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _anywhere(condition: bool) -> bool:
    """Whether it holds on any process."""
    return condition if jax.process_count() == 1 else bool(multihost_utils.process_allgather(condition).any())


def load_groups(workdir: epath.PathLike) -> tuple[int, dict[str, Any]]:
    """(step, {"params", "ema", "model_state"}) of the newest readable checkpoint as numpy arrays, without knowing the model.

    Raises FileNotFoundError where there is none.
    """
    directory = epath.Path(workdir).absolute() / "checkpoints"
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    for step in steps:
        try:
            tree = _read_numpy(directory / str(step))
            return step, {name: tree.get(name) or {} for name in ("params", "ema", "model_state")}
        except Exception as error:  # noqa: BLE001  whatever a damaged file makes the readers raise
            logging.error(
                "checkpoint %d in %s cannot be read (%s); trying the one before", step, directory, _brief(error)
            )
    raise FileNotFoundError(f"found no readable checkpoint in {directory}, expected one; train into {workdir} first")


def _read_numpy(path: epath.Path) -> Any:
    """The state of one checkpoint with every array as numpy: the mesh it was saved on need not exist here."""
    handlers = {STATE: ocp.PyTreeCheckpointHandler(), META: ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        saved = reader.metadata(path).item_metadata[STATE].tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        items = {STATE: ocp.args.PyTreeRestore(restore_args=restore_args), META: ocp.args.JsonRestore()}
        read = reader.restore(path, ocp.args.Composite(**items))
    _compare(read[META][CHECKSUM], int(checksum(read[STATE], np)))
    return read[STATE]
