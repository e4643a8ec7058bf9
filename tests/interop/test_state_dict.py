import sys

import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.state_dict import convert_state_dict, read_state_dict


def name(path):
    return ".".join(path)


def test_kernels_change_layout_and_the_rest_does_not():
    rng = np.random.default_rng(0)
    template = {"conv": {"kernel": np.zeros((3, 3, 2, 4))}, "dense": {"kernel": np.zeros((2, 5)), "bias": np.zeros(5)}}
    tensors = {
        "conv.kernel": rng.normal(size=(4, 2, 3, 3)),
        "dense.kernel": rng.normal(size=(5, 2)),
        "dense.bias": rng.normal(size=5),
    }
    tree = convert_state_dict(tensors, template, name, "here")
    assert tree["conv"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(tree["conv"]["kernel"][1, 2, 0, 3], np.float32(tensors["conv.kernel"][3, 0, 1, 2]))
    np.testing.assert_array_equal(tree["dense"]["kernel"][1, 4], np.float32(tensors["dense.kernel"][4, 1]))
    np.testing.assert_array_equal(tree["dense"]["bias"], np.float32(tensors["dense.bias"]))


def test_everything_that_does_not_fit_is_listed_at_once():
    template = {"a": {"bias": np.zeros(3)}, "b": {"bias": np.zeros(3)}, "c": {"kernel": np.zeros((2, 5))}}
    tensors = {"a.bias": np.zeros(4), "c.kernel": np.zeros((2, 5)), "d": np.zeros(1)}
    with pytest.raises(ValueError, match="in here") as error:
        convert_state_dict(tensors, template, name, "here")
    text = str(error.value)
    assert "missing: b.bias" in text and "extra: d" in text
    assert "a.bias (4,) for a/bias (3,)" in text and "c.kernel (2, 5) for c/kernel (2, 5)" in text


def test_reads_npz_and_safetensors_alike(tmp_path):
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}
    np.savez(tmp_path / "w.npz", **tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    for file in ("w.npz", "w.safetensors"):
        found = read_state_dict(tmp_path / file, "weights", "do this")
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(found[key], tensor)


def test_missing_and_unknown_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz.*the weights; do this"):
        read_state_dict(tmp_path / "absent.npz", "the weights", "do this")
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match=r"w\.h5.*\.safetensors"):
        read_state_dict(tmp_path / "w.h5", "the weights", "do this")


LFS = b"version https://git-lfs.github.com/spec/v1\n"
CUT = slice(None, -40)


def refused(path, whole):
    """The error's text for a file that is cut short, empty, and something else."""
    for content in (whole[CUT], b"", LFS):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="unreadable") as error:
            read_state_dict(path, "the weights", "do this")
        assert f"found {str(path)!r} unreadable (" in str(error.value)
        assert str(error.value).endswith("), expected the weights; download it again")
        assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    tensors = {"a": np.ones((20, 20), np.float32)}
    np.savez(tmp_path / "w.npz", **tensors)
    refused(tmp_path / "w.npz", (tmp_path / "w.npz").read_bytes())
    refused(tmp_path / "w.safetensors", safetensors.numpy.save(tensors))
    np.save(tmp_path / "w.npy", tensors["a"])
    (tmp_path / "w.npz").write_bytes((tmp_path / "w.npy").read_bytes())
    with pytest.raises(ValueError, match=r"w\.npz' unreadable"):
        read_state_dict(tmp_path / "w.npz", "the weights", "do this")


def test_pth_without_torch_says_so(tmp_path, monkeypatch):
    (tmp_path / "w.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="no torch.*save the state dict as"):
        read_state_dict(tmp_path / "w.pth", "the weights", "do this")


@pytest.mark.parity
def test_reads_pth_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth", "weights", "do this")
    np.testing.assert_array_equal(found["a"], np.arange(6.0).reshape(2, 3))
    assert found["b"].dtype == np.float32


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pth_is_named(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(20, 20)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, path.read_bytes())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("content", "found"), [("tensor", "a Tensor"), ("list", "a list"), ("trainer", r"\['epoch', 'model'\]")]
)
def test_pth_of_something_else_is_named(tmp_path, content, found):
    torch = pytest.importorskip("torch")
    x = torch.ones(3)
    torch.save({"tensor": x, "list": [x], "trainer": {"model": {"a": x}, "epoch": 3}}[content], tmp_path / "w.pth")
    for entries in ((), ("ema",)):
        with pytest.raises(ValueError, match=rf"found {found} in '.*w\.pth', expected tensors by name.*: the weights"):
            read_state_dict(tmp_path / "w.pth", "the weights", "do this", entries)


@pytest.mark.parity
def test_the_first_entry_that_is_there_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "w.pt")
    for entries in (("ema", "model"), ("absent", "ema")):
        assert read_state_dict(tmp_path / "w.pt", "the weights", "do this", entries)["a"] == 1
