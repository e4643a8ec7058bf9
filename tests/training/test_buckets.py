"""Work directories in buckets: etils' path over fsspec, here with a file system in memory in place of Google's.

Orbax writes its arrays through TensorStore's own driver, which needs the network: what is tested is all the rest.
"""

import json

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.training import runs
from fid_imagegen.training.writers import Writer, read_metrics


class Bucket(MemoryFileSystem):
    """Objects by name; like a bucket's, none can be appended to."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs: list = [""]

    def __init__(self, *args, finalize_on_close=False, **kwargs):
        super().__init__(*args, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode, "buckets do not append"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    return epath.Path("gs://bucket/run")


def test_a_log_in_a_bucket_is_written_at_each_flush_and_resumed(bucket):
    writer = Writer(bucket, start=0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": step / 2})
    assert read_metrics(bucket) == []
    writer.flush()
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3]
    writer.write_images(3, {"samples": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    assert (bucket / "samples" / "samples_0000003.png").read_bytes()[:4] == b"\x89PNG"
    resumed = Writer(bucket, start=2, tensorboard=False)
    resumed.write_scalars(3, {"loss": 7.0})
    resumed.close()
    assert read_metrics(bucket) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 7.0}]


def test_the_config_in_a_bucket_is_checked_too(bucket, tiny):
    runs.write_config(bucket, tiny())
    assert json.loads((bucket / "config.json").read_text()) == json.loads(tiny().to_json())
    assert not (bucket / "config.tmp").exists()
    with pytest.raises(ValueError, match="found another config in gs://bucket/run/config.json: seed"):
        runs.write_config(bucket, tiny(seed=5))
    assert runs.read_config(bucket).seed == tiny().seed


def test_a_frozen_group_is_one_object(bucket):
    (bucket / "frozen").mkdir(parents=True)
    save_tree(bucket / "frozen" / "lpips-0.safetensors", {"a": {"b": jax.numpy.ones(3)}}, {})
    assert [path.name for path in (bucket / "frozen").iterdir()] == ["lpips-0.safetensors"]
