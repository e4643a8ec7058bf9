import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import augmentation_net
from fid_imagegen import tasks
from fid_imagegen.evaluation import features
from fid_imagegen.evaluation.distances import frechet_distance, gaussian_statistics
from fid_imagegen.evaluation.features import FEATURES
from fid_imagegen.models.features.resnet56 import ResNet56
from fid_imagegen.training import runs


def test_pixels_span_minus_one_to_one():
    images = np.array([0, 255, 51, 204], np.uint8).reshape(1, 2, 2, 1)
    found = FEATURES["pixels"]()(images)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[-1, 1, -0.6, 0.6]], atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_halves_of_the_digits_are_as_far_apart_as_the_docstring_says():
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images = np.round(digits * 255 / 16).astype(np.uint8)[..., None]
    extract, distances = FEATURES["pixels"](), []
    for seed in range(5):
        found = extract(images)[np.random.default_rng(seed).permutation(len(images))]
        distances.append(frechet_distance(gaussian_statistics(found[::2]), gaussian_statistics(found[1::2])))
    assert np.mean(distances) == pytest.approx(0.296, abs=0.04)


@pytest.fixture
def resnet56(monkeypatch):
    shapes = jax.eval_shape(ResNet56().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)

    def fill(x):
        return rng.uniform(0.5, 1, x.shape) if x.ndim == 1 else rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape)

    params = jax.tree.map(lambda x: fill(x).astype(np.float32), shapes)
    monkeypatch.setattr(features, "load_resnet56", lambda path: params)
    monkeypatch.setattr(features, "BATCH", 4)
    return params, FEATURES["resnet56"]("weights.npz")


def test_resnet56_in_batches_is_resnet56_at_once(resnet56):
    params, extract = resnet56
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    expected, _ = jax.jit(ResNet56().apply)({"params": params}, images / np.float32(127.5) - 1)
    found = extract(images)
    assert found.shape == (6, 64) and found.dtype == np.float64 and np.isfinite(found).all() and found.std() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_images_of_another_size_or_dtype_are_refused(resnet56):
    _, extract = resnet56
    with pytest.raises(ValueError, match="resize them first"):
        extract(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        extract(np.zeros((2, 32, 32, 3), np.float32))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """(task, parameters, folder) of an untrained net of augmentations."""
    folder, config = tmp_path_factory.mktemp("net"), augmentation_net.get_config("runlocal").unlock()
    config.model.widths = (4, 6, 10)
    task = tasks.build(config.lock())
    groups = jax.jit(task.init)(jax.random.key(0))[0]
    runs.write_params(folder, config, groups)
    return task, groups, folder


def test_augmentation_features_are_the_means_of_the_last_two_maps(net, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)
    task, groups, folder = net
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    found = FEATURES["augmentations"](folder)(images)
    _, maps = task.model.apply({"params": groups["augmentation_net"]}, images / np.float32(127.5) - 1)
    expected = np.concatenate([np.mean(each, axis=(1, 2)) for each in maps[1:]], axis=1)
    assert found.dtype == np.float64 and found.shape == (6, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_augmentation_features_are_of_the_runs_images(net, exported):
    extract = FEATURES["augmentations"](net[2])
    for wrong in ((2, 8, 8, 3), (2, 16, 16, 1)):
        with pytest.raises(ValueError, match=r"found images .*, expected \(8, 8, 1\), on which .* was trained; "):
            extract(np.zeros(wrong, np.uint8))
    with pytest.raises(ValueError, match="found groups .'generator'. in .*, expected augmentation_net; give a run"):
        FEATURES["augmentations"](exported)


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match=r"absent\.npz.*features 'pixels'"):
        FEATURES["resnet56"]("absent.npz")
