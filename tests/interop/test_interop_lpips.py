import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.lpips import convert_lpips, load_lpips

# torchvision's configuration "D": the index counts convolutions, ReLUs and pools ("M").
CONFIGURATION = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg16():
    tensors, index, channels = {}, 0, 3
    for width in CONFIGURATION:
        if width == "M":
            index += 1
            continue
        # Every tensor its own slope, so that no two can be swapped and pass.
        kernel = np.arange(width * channels * 9, dtype=np.float32) * (index + 1)
        tensors[f"features.{index}.weight"] = kernel.reshape(width, channels, 3, 3)
        tensors[f"features.{index}.bias"] = np.arange(width, dtype=np.float32) - index
        index, channels = index + 2, width
    return tensors | {"classifier.0.weight": np.zeros((2, 2), np.float32), "classifier.0.bias": np.zeros(2, np.float32)}


@pytest.fixture(scope="module")
def heads():
    return {f"lin{i}.model.1.weight": np.arange(c, dtype=np.float32)[None, :, None, None] for i, c in enumerate(WIDTHS)}


def test_every_tensor_lands_in_its_place(tmp_path, vgg16, heads):
    squeezed = {f"vgg.{name}": x.squeeze() for name, x in heads.items()}
    np.savez(tmp_path / "heads.npz", **squeezed, **{"alex.lin0.model.1.weight": np.zeros(64)})
    safetensors.numpy.save_file(vgg16, tmp_path / "vgg16.safetensors")
    params = load_lpips(tmp_path / "vgg16.safetensors", tmp_path / "heads.npz")

    convolutions = iter(sorted(params["vgg16"]))  # conv1_1, conv1_2, conv2_1 ... is also the order of the network
    for name in sorted((n for n in vgg16 if n.endswith("weight") and n[0] == "f"), key=lambda n: int(n.split(".")[1])):
        ours = params["vgg16"][next(convolutions)]
        np.testing.assert_array_equal(ours["kernel"], vgg16[name].transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(ours["bias"], vgg16[name.replace("weight", "bias")])
    assert next(convolutions, None) is None
    for i, width in enumerate(WIDTHS):
        np.testing.assert_array_equal(params[f"lin{i}"], np.arange(width))


def test_heads_of_the_authors_file_and_of_the_npz_are_the_same(vgg16, heads):
    authors = convert_lpips(vgg16, heads, "here")
    packed = convert_lpips(vgg16, {f"vgg.{name}": x.squeeze() for name, x in heads.items()}, "here")
    for i in range(5):
        np.testing.assert_array_equal(authors[f"lin{i}"], packed[f"lin{i}"])


def test_missing_file_is_named_with_the_stated_variants(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth.*torchvision.*config\.distance='l2'") as error:
        load_lpips(tmp_path / "vgg16-397923af.pth", tmp_path / "heads.npz")
    assert "config.STAGE.objective.perceptual='laplacian' for Stage A and the previewer" in str(error.value)


def test_wrong_tensors_are_all_listed(vgg16, heads):
    vgg16 = {name: x for name, x in vgg16.items() if name not in ("features.0.weight", "features.28.bias")}
    alex = {"lin0.model.1.weight": np.zeros((1, 32, 1, 1))}
    with pytest.raises(ValueError, match="in here") as error:
        convert_lpips(vgg16 | {"features.1.weight": np.zeros(1)}, heads | alex, "here")
    for name in ("features.0.weight", "features.28.bias", "features.1.weight", "lin0.model.1.weight (32,)"):
        assert name in str(error.value)
