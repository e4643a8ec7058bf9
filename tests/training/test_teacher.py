"""Consistency distillation: a run that learns from another run."""

import jax
import numpy as np
import pytest

from fid_imagegen import tasks
from fid_imagegen.training import runs, warm_start
from fid_imagegen.training.loop import Run, train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def teacher(tiny, one_device, tmp_path_factory):
    """The folder of a diffusion model."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    config = tiny("edm", distance="l2", num_steps=2, **{"optimizers.generator.learning_rate": 0.1})
    assert train(config, folder)
    return folder


def student(tiny, teacher, **changes):
    changes = {"distance": "l2", "num_steps": 2, "init.generator": "../teacher", "init.teacher": "../teacher"} | changes
    return tiny("cd", **changes)


def test_a_student_starts_as_its_teacher_and_leaves_it_alone(tiny, teacher):
    workdir = teacher.parent / "student"
    config = student(tiny, teacher, **{"optimizers.generator.learning_rate": 0.1})
    run, (_, theirs) = Run(config, workdir), runs.read_params(teacher)
    jax.tree.map(np.testing.assert_array_equal, run.frozen["teacher"], theirs["generator"])
    assert train(config, workdir)
    _, ours = runs.read_params(workdir)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours["generator"], theirs["generator"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    functions = jax.jit(tasks.build(config).sample)(ours, jax.random.key(0), np.arange(2))
    assert functions.native.noisy.shape == (2, 4, 4, 1)


@pytest.fixture(scope="module")
def no_denoiser(tiny, teacher):
    """Folders of runs whose generator is none: the phase before the teacher, and a consistency model."""
    _, params = runs.read_params(teacher)
    for name, config in (("pretrained", tiny("edm", distance="l2", task="reconstruction")), ("jumps", tiny("ect"))):
        runs.write_params(teacher.parent / name, config, params)


@pytest.mark.usefixtures("no_denoiser")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init.teacher": ""}, "found no weights for the frozen group 'teacher', .*set config.init.teacher"),
        ({"data.image_size": 8}, "found a teacher in ../teacher with another data.image_size: 4 there, 8 here"),
        (
            {"time": "angle", "noise.sigma_max": 40.0},
            "another noise.sigma_max: 80.0 there, 40.0 here; time: 'log' there, 'angle' here",
        ),
        ({"model.norm": "rms"}, "another model.norm: 'layer' there, 'rms' here"),
        ({"data.channels": 3, "model.groups": 1}, "another data.channels: 1 there, 3 here"),
        ({"preconditioning": "edm"}, "another preconditioning: 'x0_blend' there, 'edm' here"),
        ({"grid": 4, "variational": False}, "another grid: 0 there, 4 here"),
        ({"model.width": 32}, "another model.width: 16 there, 32 here"),
        # Tensors of the same shapes, read otherwise.
        ({"model.heads": 4}, "another model.heads: 2 there, 4 here"),
        ({"model.level_scale": 1.0}, "another model.level_scale: 1000.0 there, 1.0 here"),
        (
            {"init.teacher": "../pretrained"},
            "found a run of task 'reconstruction' and objective 'edm' in ../pretrained, expe",
        ),
        (
            {"init.teacher": "../jumps"},
            "found a run of task 'consistency' and objective 'ect' in ../jumps, expected a teacher",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tiny, teacher, changes, message):
    workdir = teacher.parent / "refused"
    with pytest.raises(ValueError, match=message):
        Run(student(tiny, teacher, **changes), workdir)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preconditioning": "edm"},
            "found a generator in ../teacher with another preconditioning: 'x0_blend' there, 'edm' here",
        ),
        ({"model.heads": 4}, "another model.heads: 2 there, 4 here"),
        ({"noise.sigma_data": 1.0}, "another noise.sigma_data: 0.5 there, 1.0 here"),
    ],
)
def test_a_start_that_another_network_trained_is_refused(tiny, teacher, changes, message):
    """In shapes alone these fit."""

    def start(**changes):
        task = tasks.build(tiny("ect", **changes))
        abstract = {"generator": jax.eval_shape(lambda: task.init(jax.random.key(0))[0]["generator"])}
        return warm_start.fill(abstract, {"generator": "../teacher"}, teacher.parent / "started", task.borrowed)

    with pytest.raises(ValueError, match=message):
        start(**changes)
    _, theirs = runs.read_params(teacher)
    started = start(**{"noise.sigma_max": 40.0, "model.dtype": "bfloat16"})  # what a start need not share
    jax.tree.map(np.testing.assert_array_equal, started["generator"], theirs["generator"])


def test_a_run_does_not_go_on_with_another_objective(tiny, teacher):
    with pytest.raises(ValueError, match="found another config in .*objective.name: 'edm' there, 'ect' now"):
        train(tiny("ect", distance="l2", num_steps=2, **{"optimizers.generator.learning_rate": 0.1}), teacher)
