import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.safetensors_io import load_tree, save_tree

TREE = {
    "generator": {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # a view: its memory is not in order
        "half": jnp.arange(4, dtype=jnp.bfloat16) / 3,
        "step": np.array(7, np.int32),
    },
    "table": np.zeros((0, 3), np.uint8),
    "spectral": {"conv/kernel/sigma": np.ones(3)},
}


def test_round_trip_is_exact(tmp_path):
    save_tree(tmp_path / "w.safetensors", TREE, {"config": "{}"})
    tree, metadata = load_tree(tmp_path / "w.safetensors")
    assert metadata == {"config": "{}"}
    assert jax.tree.structure(tree) == jax.tree.structure(TREE)
    for found, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(TREE), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, np.asarray(expected))
    assert tree["generator"]["half"].dtype == jnp.bfloat16


def test_names_are_joined_with_slashes(tmp_path):
    save_tree(tmp_path / "w.safetensors", TREE, {})
    assert "generator/kernel" in safetensors.numpy.load_file(tmp_path / "w.safetensors")


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_tree(path, TREE, {})
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_tree(path, {"a": np.ones(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_truncated_files_are_refused(tmp_path, size):
    path = tmp_path / "w.safetensors"
    save_tree(path, TREE, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"w\.safetensors.*expected a whole safetensors file"):
        load_tree(path)


@pytest.mark.parametrize("tree", [{"a%2Fb": np.ones(1)}, {"a": {}}, {"": np.ones(1)}, {1: np.ones(1)}, {"a": 1.0}])
def test_trees_that_would_not_come_back_are_refused(tmp_path, tree):
    with pytest.raises(ValueError, match="expected arrays under"):
        save_tree(tmp_path / "w.safetensors", tree, {})
    assert not list(tmp_path.iterdir())


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(ValueError, match="json.dumps"):
        save_tree(tmp_path / "w.safetensors", {"a": np.ones(1)}, {"step": 3})
