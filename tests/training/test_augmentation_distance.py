"""A generator held to what a net of augmentations, another run, sees."""

import jax
import numpy as np
import pytest

from configs import augmentation_net
from fid_imagegen import tasks
from fid_imagegen.training import runs
from fid_imagegen.training.loop import Run
from fid_imagegen.training.phases import pretrain_config, run

WIDTHS = (8, 8)


def net_config():
    config = augmentation_net.get_config("runlocal").unlock()
    config.num_steps, config.model.widths = 3, WIDTHS
    config.log.update({"every": 1, "tensorboard": False})
    return config.lock()


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """The folder of an untrained net."""
    folder, config = tmp_path_factory.mktemp("runs") / "net", net_config()
    runs.write_params(folder, config, jax.jit(tasks.build(config).init)(jax.random.key(0))[0])
    return folder


def student(tiny, **changes):
    data = {"data.source": "digits", "data.image_size": 8, "augmentation_net.widths": WIDTHS, "num_steps": 2}
    own = {"distance": "augmentations", "init.augmentation_net": "../net", "model.patch": 4}
    return tiny("ect", **(data | own | changes))


def test_a_net_trains_saves_and_reports(devices, tmp_path):
    devices(1)
    assert run(net_config(), tmp_path)
    _, groups = runs.read_params(tmp_path)
    assert set(groups) == {"augmentation_net"}
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"accuracy"' in lines and '"loss"' in lines and list((tmp_path / "samples").glob("*.png"))


def test_a_generator_trains_on_the_nets_distance_and_leaves_it_alone(devices, tiny, net):
    devices(1)
    made = Run(student(tiny, **{"optimizers.generator.learning_rate": 0.1}), net.parent / "student")
    made.write_config()
    before = made.initial()
    kernels = jax.tree.map(np.asarray, before.params["generator"])
    after, metrics = made.step(before, made.frozen, next(made.batches(0)), made.key)
    assert metrics["finite"] and metrics["loss"] > 1 and set(after.params) == {"generator"}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), kernels, after.params["generator"])
    assert max(jax.tree.leaves(moved)) > 0.01
    _, theirs = runs.read_params(net)
    jax.tree.map(np.testing.assert_array_equal, made.frozen["augmentation_net"], theirs["augmentation_net"])
    assert list((made.workdir / "frozen").glob("augmentation_net-*.safetensors"))


def test_the_distance_is_of_the_groups_weights_and_its_gradient_of_norm_one(tiny, net):
    task, (_, groups) = tasks.build(student(tiny)), runs.read_params(net)
    a, b = (np.random.default_rng(seed).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32) for seed in (0, 1))
    measure = jax.jit(jax.value_and_grad(lambda a, groups: task._distance(groups)(a, b).sum()))
    value, gradient = measure(a, groups)
    np.testing.assert_allclose(np.sqrt((gradient**2).sum(axis=(1, 2, 3))), 1, rtol=1e-4)
    other, _ = measure(a, jax.tree.map(lambda x: 2 * x, groups))
    assert value > 1 and abs(other - value) > 1e-3 * value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"init.augmentation_net": ""},
            "found no weights for .*'augmentation_net', .*set config.init.augmentation_net",
        ),
        (
            {"data.channels": 3, "data.source": "synthetic", "model.groups": 1},
            "found an augmentation net in ../net with another data.channels: 1 there, 3 here; expected the same; train one",
        ),
        ({"data.image_size": 16, "data.source": "synthetic"}, "another data.image_size: 8 there, 16 here"),
        ({"augmentation_net.widths": (8, 16)}, "found weights in ../net that do not fit this model: .*conv2_1/bias"),
        ({"distance": "l2"}, "found config.init.augmentation_net, expected one of the groups"),
        ({"init.augmentation_net": "../nowhere"}, "found no .*nowhere.*expected a work directory"),
    ],
)
def test_a_net_that_does_not_fit_is_refused(devices, tiny, net, changes, message):
    devices(1)
    workdir = net.parent / "refused"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Run(student(tiny, **changes), workdir)
    assert not workdir.exists()


def test_pre_training_by_reconstruction_needs_no_net(tiny):
    phase = pretrain_config(student(tiny, **{"pretrain.num_steps": 2, "init.teacher": "../teacher"}))
    assert set(phase.init.to_dict().values()) == {""}
