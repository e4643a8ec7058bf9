"""Stage B's compressor starts from public weights: what a new run reads of torchvision's file, and that nothing else needs it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.interop import efficientnet
from fid_imagegen.models.wuerstchen.compressor import COMPRESSORS, EfficientNetCompressor
from fid_imagegen.models.wuerstchen.efficientnet import EfficientNetV2Features, Spec, Stage
from fid_imagegen.training import loop

SMALL = Spec(
    8, (Stage(True, 1, 8, 1, 2), Stage(True, 2, 8, 1, 2), Stage(False, 2, 8, 2, 2), Stage(False, 2, 8, 1, 2)), 16
)
FEATURES = EfficientNetV2Features(SMALL)


@pytest.fixture
def build(monkeypatch, devices):
    """build(**changes) -> Stage B's config with a small EfficientNet, and a Stage A of ones."""
    devices(1)
    monkeypatch.setitem(COMPRESSORS, "efficientnet_v2_s", partial(EfficientNetCompressor, SMALL))
    frozen = tasks.stage_b.StageBTask.frozen

    def ones(self):
        return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), frozen(self))

    monkeypatch.setattr(tasks.stage_b.StageBTask, "frozen", ones)

    def make(**changes):
        config = wuerstchen.get_config("runlocal").stage_b
        config.unlock()
        config.init.vqgan = ""
        config.model.update(
            {"c_hidden": (16,), "nhead": (-1,), "blocks": (1,), "level_config": ("CT",), "inject_effnet": (True,)}
        )
        config.update_from_flattened_dict({"compressor.name": "efficientnet_v2_s"} | changes)
        return config.lock()

    return make


@pytest.fixture
def weights(tmp_path):
    """(path, tensors) of a file as torchvision's: the whole classifier, no tensor at its start, no two alike."""
    template = jax.eval_shape(lambda: FEATURES.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), template)
    rng, path = np.random.default_rng(0), tmp_path / "efficientnet_v2_s.safetensors"
    draw = lambda x: rng.uniform(0.5, 1, x.shape).astype(x.dtype) if x.ndim else x  # noqa: E731
    tensors = {name: draw(x) for name, x in efficientnet.to_state_dict(FEATURES, zeros).items()}
    classifier = {"classifier.1.weight": np.ones((10, 16), np.float32), "classifier.1.bias": np.ones(10, np.float32)}
    safetensors.numpy.save_file(tensors | classifier, path)
    return path, tensors


def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    return said


def test_a_new_run_starts_from_it(build, weights, tmp_path, monkeypatch):
    path, tensors = weights
    said, run = warnings(monkeypatch), loop.Run(build(**{"compressor.weights": str(path)}), tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.initial()
    assert not any("random weights" in text for text in said)
    stats = state.model_state["compressor_stats"]
    for params in (state.params, *state.ema.values()):
        found = {"params": params["compressor"]["backbone"], "batch_stats": stats["batch_stats"]["backbone"]}
        back = efficientnet.to_state_dict(FEATURES, found)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    # All else is fresh: the mapper with its BatchNorm, and the latents' moments.
    mapper = state.params["compressor"]["mapper"]
    assert np.std(mapper["conv"]["kernel"]) > 0 and np.all(mapper["norm"]["scale"] == 1)
    for moments in (stats["batch_stats"]["mapper"]["norm"], stats["latents"]):
        assert [float(np.std(x)) for x in moments.values()] == [0, 0] and {float(x[0]) for x in moments.values()} == {
            0,
            1,
        }


def test_nothing_but_a_first_start_needs_it(build, tmp_path):
    """A run is laid out, and its task built and its tree made, where the file has gone: so it is resumed and sampled."""
    run = loop.Run(build(**{"compressor.weights": str(tmp_path / "gone.pth")}), tmp_path)
    assert set(run.abstract.params) == {"stage_b", "compressor"}
    run.task.init = lambda key: jax.tree.map(
        lambda x: jnp.zeros(x.shape), (run.abstract.params, run.abstract.model_state)
    )
    with (
        jax.set_mesh(run.mesh),
        pytest.raises(FileNotFoundError, match=r"found no file '.*gone\.pth', expected torchvision's ImageNet weights"),
    ):
        run.initial()


def test_a_random_start_is_told(build, monkeypatch):
    said = warnings(monkeypatch)
    assert tasks.build(build()).pretrained() == {}
    assert [text for text in said if "starts from random weights, where the paper starts from ImageNet's" in text]
    said.clear()
    quiet = (
        {"compressor.name": "conv"},
        {"init.compressor": "../stage_b_512"},
        {"model.inject_effnet": (False,), "text.encoder": "small"},
    )
    assert [tasks.build(build(**changes)).pretrained() for changes in quiet] == [{}, {}, {}] and not said


def test_what_does_not_fit_is_refused(build, weights):
    path, tensors = weights
    given = {"compressor.weights": str(path)}
    with pytest.raises(
        ValueError, match=r"found config\.compressor\.weights '.*' for compressor 'conv', expected none"
    ):
        tasks.build(build(**given, **{"compressor.name": "conv"})).pretrained()
    with pytest.raises(
        ValueError, match=r"weights '.*' beside config\.init\.compressor '\.\./b', expected one of them"
    ):
        tasks.build(build(**given, **{"init.compressor": "../b"})).pretrained()
    del tensors["features.1.0.block.0.1.running_var"]
    tensors |= {"features.9.weight": np.zeros(1, np.float32), "features.0.1.bias": np.zeros(9, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="do not fit in .*efficientnet_v2_s") as error:
        tasks.build(build(**given)).pretrained()
    for part in (
        "missing: features.1.0.block.0.1.running_var",
        "extra: features.9.weight",
        "features.0.1.bias (9,) for",
    ):
        assert part in str(error.value)
