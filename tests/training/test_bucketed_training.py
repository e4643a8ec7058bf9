"""Training on pictures of random sizes in two buckets: one program a bucket, and the same run however it is cut."""

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import resume_campaign
from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.data import pipeline, sources
from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.training import loop, runs

BUCKETS = ((64, 96), (96, 64))


def write_compressor(folder, config):
    """A folder that `config.init.compressor` can name."""
    rng = np.random.default_rng(1)
    frozen = tasks.build(config).frozen()
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), frozen["compressor"])
    stats = jax.tree.map(lambda x: np.ones(x.shape, np.float32), frozen["compressor_stats"])
    runs.write_config(folder, config)
    save_tree(folder / "model.safetensors", {"compressor": params, "compressor_stats": stats}, {})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """config(**changes) -> Stage C, whose compressor sees a quarter of every side, on 24 captioned pictures."""
    compressor = tmp_path_factory.mktemp("compressor")
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        height, width = sorted(rng.integers((64, 100), (90, 140)), reverse=bool(i % 2))
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture.resize((width, height)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")

    def make(**changes):
        made = wuerstchen.get_config("runlocal").stage_c
        made.unlock()
        made.data.update({"source": "captions", "path": str(folder), "buckets": BUCKETS, "flip": True})
        made.update({"num_steps": 100, "batch_size": 16, "seed": 3})
        made.update_from_flattened_dict({"compressor.size": 16, "compressor.stride": 4, "compressor.widths": (4, 8)})
        made.update_from_flattened_dict({"text.vocabulary": 300, "text.layers": 1})
        made.update_from_flattened_dict(
            {"model.depth": 1, "model.remat": False, "model.dropout": 0.0, "sampling.steps": 1}
        )
        made.update_from_flattened_dict({"log.every": 1, "log.sample_every": 1000, "log.tensorboard": False})
        made.update_from_flattened_dict({"checkpoint.every": 100, "log.num_samples": 1})
        made.init.compressor = str(compressor)
        made.update_from_flattened_dict(changes)
        return made.lock()

    write_compressor(compressor, make())
    return make


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of the pictures of every step that was read."""
    seen, batches = [], loop.pipeline.batches

    def note(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            seen.append(batch["image"].shape)
            yield batch

    monkeypatch.setattr(loop.pipeline, "batches", note)
    return seen


def test_stage_c_in_buckets_is_the_same_interrupted_and_resumed(config, tmp_path, devices, stop_at, shapes):
    devices(1)
    stop_at(5)  # before the last step, which makes previews
    loop.train(config(), tmp_path / "whole")
    assert len(set(shapes[:3])) == len(set(shapes[3:])) == 2 and set(shapes) == {(16, *size, 3) for size in BUCKETS}
    whole = shapes.copy()
    shapes.clear()
    stop_at(3)
    loop.train(config(), tmp_path / "run")
    stop_at(5)
    loop.train(config(), tmp_path / "run")
    assert shapes == whole
    assert resume_campaign.last_state(tmp_path / "run") == resume_campaign.last_state(tmp_path / "whole")
    assert resume_campaign.losses(tmp_path / "run") == resume_campaign.losses(tmp_path / "whole")


def test_buckets_on_eight_devices_in_two_micro_batches_are_those_on_one(toy, tmp_path, monkeypatch, devices, shapes):
    class Pooled(tasks.TASKS["toy"]):
        def loss(self, groups, model_state, batch, key, step):
            pooled = jax.image.resize(batch["image"], (len(batch["image"]), 4, 4, 1), "nearest")
            return super().loss(groups, model_state, batch | {"image": pooled}, key, step)

    monkeypatch.setitem(tasks.TASKS, "toy", Pooled)
    monkeypatch.setattr(tasks, "BUCKETED", ("toy",))
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (4, 8) if i % 2 else (8, 4), np.uint8)).save(folder / f"{i}.png")
    data = {"data.source": "folder", "data.path": str(folder), "data.buckets": ((4, 8), (8, 4))}
    config = {"batch_size": 16, "num_steps": 8, **data}
    assert loop.train(toy(**config), tmp_path / "one")
    devices(8)
    assert loop.train(toy(**config, **{"mesh.fsdp": 4, "accumulate": 2}), tmp_path / "eight")
    assert {shape[1:3] for shape in shapes} == {(4, 8), (8, 4)}
    one, eight = (resume_campaign.losses(tmp_path / name) for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert len({loss for _, loss, _ in one}) == 8


def test_two_processes_read_the_rows_of_one(config):
    """Where a process stands in the data does not hang on what the others read: both are in the same bucket at every step."""
    made = config()
    source = sources.make_source(made.data)

    def rows(**options):
        iterator = pipeline.batches(source, made.data, seed=made.seed, batch_size=16, **options)
        found = [next(iterator) for _ in range(10)]
        iterator.close()
        return found

    parts = [rows(process_index=p, process_count=2) for p in range(2)]
    for whole, first, second in zip(rows(), *parts, strict=True):
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([first[key], second[key]]), whole[key], err_msg=key)


def test_a_record_that_is_too_small_shows_before_anything_is_written(config, tmp_path, devices):
    devices(1)
    with pytest.raises(ValueError, match=r"found 24 of 24 records of captions:.* too small for their bucket"):
        loop.train(config(**{"data.buckets": ((256, 384),)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
