import logging as std_logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from fid_imagegen.training import checkpoint, loop
from fid_imagegen.training.checkpoint import Checkpoints, load_groups
from fid_imagegen.training.loop import train
from fid_imagegen.training.writers import read_metrics

# Noise does not compress: the arrays are the largest file of a checkpoint.
NOISE = jax.random.normal(jax.random.key(0), (1024,))


def state(value):
    return {"params": {"w": value + NOISE}, "ema": {"0.9": {"w": NOISE - value}}, "step": jnp.int32(3)}


ABSTRACT = jax.eval_shape(lambda: state(0.0))


@pytest.fixture
def one():
    """The abstract state on one device."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), ABSTRACT)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 2, 4 and 6, each of its step's value."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, state(float(step)), {"data": "digits", "frozen": {}})
    checkpoints.close()
    return tmp_path / "checkpoints"


@pytest.fixture
def log(caplog):
    logging.use_absl_handler()
    logger = std_logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    """In the middle of the arrays' file, which is noise: no other checksum covers it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "a bit flipped": lambda path: flip_a_bit(largest(path / "state")),
    "cut short": lambda path: largest(path / "state").write_bytes(largest(path / "state").read_bytes()[:1000]),
    "emptied": lambda path: largest(path / "state").write_bytes(b""),
    "data removed": lambda path: largest(path / "state").unlink(),
    "index scrambled": lambda path: next((path / "state" / "d").iterdir()).write_bytes(b"x" * 300),
    "manifest removed": lambda path: (path / "state" / "manifest.ocdbt").unlink(),
    "manifest scrambled": lambda path: (path / "state" / "manifest.ocdbt").write_bytes(b"x" * 100),
    "meta cut short": lambda path: (path / "meta" / "metadata").write_text('{"data": '),
    "checksum of another": lambda path: shutil.copy(path.parent / "4/meta/metadata", path / "meta/metadata"),
    "state removed": lambda path: shutil.rmtree(path / "state"),
}


def test_the_newest_is_restored_and_the_oldest_go(saved, one):
    checkpoints = Checkpoints(saved.parent, keep=3)
    restored, meta = checkpoints.restore(one)
    np.testing.assert_array_equal(restored["params"]["w"], NOISE + 6)
    assert meta == {"data": "digits", "frozen": {}}
    checkpoints.save(8, state(8.0), meta)
    checkpoints.close()
    assert steps(saved) == [4, 6, 8]


def test_nothing_saved_is_nothing_restored(tmp_path, one):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.restore(one) is None
    checkpoints.close()
    with pytest.raises(FileNotFoundError, match="found no readable checkpoint in .*; train into"):
        load_groups(tmp_path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(saved, one, log, damage):
    DAMAGE[damage](saved / "6")
    step, groups = load_groups(saved.parent)
    assert step == 4
    np.testing.assert_array_equal(groups["ema"]["0.9"]["w"], NOISE - 4)
    checkpoints = Checkpoints(saved.parent, keep=3)
    restored, _ = checkpoints.restore(one)
    np.testing.assert_array_equal(restored["params"]["w"], NOISE + 4)
    assert steps(saved) == [2, 4] and (saved / "unreadable-6").is_dir()
    assert "checkpoint 6 cannot be read" in log.text and "unreadable-6, using the one before" in log.text
    checkpoints.save(6, state(7.0), {"data": "digits", "frozen": {}})  # the same step again
    checkpoints.close()
    again = Checkpoints(saved.parent, keep=3)
    np.testing.assert_array_equal(again.restore(one)[0]["params"]["w"], NOISE + 7)
    again.close()
    assert load_groups(saved.parent)[0] == 6


def test_two_damaged_checkpoints_are_skipped(saved, one):
    DAMAGE["cut short"](saved / "6")
    DAMAGE["data removed"](saved / "4")
    checkpoints = Checkpoints(saved.parent, keep=3)
    np.testing.assert_array_equal(checkpoints.restore(one)[0]["params"]["w"], NOISE + 2)
    checkpoints.close()
    assert steps(saved) == [2] and (saved / "unreadable-4").exists() and (saved / "unreadable-6").exists()


def test_if_none_can_be_read_nothing_is_moved(saved, one):
    """The fault may lie in the reader: starting over by itself would throw work away."""
    for step in (2, 4, 6):
        DAMAGE["emptied"](saved / str(step))
    checkpoints = Checkpoints(saved.parent, keep=3)
    with pytest.raises(
        RuntimeError, match=r"found no readable checkpoint in .*6: .*4: .*2: .*delete the directory to start"
    ):
        checkpoints.restore(one)
    checkpoints.close()
    assert steps(saved) == [2, 4, 6]


def test_an_unfinished_save_is_no_checkpoint(saved, one):
    shutil.copytree(saved / "6", saved / "8.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(saved.parent, keep=3)
    np.testing.assert_array_equal(checkpoints.restore(one)[0]["params"]["w"], NOISE + 6)
    checkpoints.close()
    assert load_groups(saved.parent)[0] == 6


def test_processes_agree_on_what_is_readable(saved, one, monkeypatch):
    """Another process that cannot read the newest makes this one take the one before too."""
    others = iter([True, False])
    monkeypatch.setattr(checkpoint, "_anywhere", lambda unreadable: unreadable | next(others))
    checkpoints = Checkpoints(saved.parent, keep=3)
    np.testing.assert_array_equal(checkpoints.restore(one)[0]["params"]["w"], NOISE + 4)
    checkpoints.close()


def test_a_run_goes_on_from_the_one_before_and_saves_the_same_step_again(toy, tmp_path):
    train(toy(), tmp_path / "whole")
    train(toy(), tmp_path / "run")
    DAMAGE["cut short"](tmp_path / "run" / "checkpoints" / "6")
    assert train(toy(), tmp_path / "run")
    step, groups = load_groups(tmp_path / "run")
    assert step == 6
    jax.tree.map(np.testing.assert_array_equal, groups, load_groups(tmp_path / "whole")[1])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints_whole(toy, tmp_path, monkeypatch):
    toy.width = 1024  # 64 KiB a copy of the parameters, of which a checkpoint holds five
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), loop.Checkpoints.save

    def fill_the_disk(self, step, *args):
        if step == 4:  # no file may grow beyond this: the write fails, as it does without space
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        save(self, step, *args)

    monkeypatch.setattr(loop.Checkpoints, "save", fill_the_disk)
    try:
        with pytest.raises(
            RuntimeError, match="found a failed checkpoint write in .*expected free and writable space; free"
        ):
            train(toy(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(tmp_path / "checkpoints") == [2]
    monkeypatch.setattr(loop.Checkpoints, "save", save)
    assert train(toy(), tmp_path)
    assert steps(tmp_path / "checkpoints") == [2, 4, 6]


@pytest.mark.parametrize("what", ["data", "frozen"])
def test_a_checkpoint_of_other_data_or_weights_is_refused(toy, tmp_path, monkeypatch, what):
    toy.frozen = {"lpips": {"w": np.zeros(3, np.float32)}}
    train(toy(), tmp_path)
    assert len(list((tmp_path / "frozen").iterdir())) == 1
    if what == "frozen":
        toy.frozen = {"lpips": {"w": np.ones(3, np.float32)}}
    else:
        monkeypatch.setattr(loop.Run, "meta", property(lambda run: {"data": "another", "frozen": run.frozen_hashes}))
    with pytest.raises(ValueError, match=rf"made with other {what}: .*give the same data and weights, or choose a new"):
        train(toy(), tmp_path)
    assert steps(tmp_path / "checkpoints") == [2, 4, 6]
