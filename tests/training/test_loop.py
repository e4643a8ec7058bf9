import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import resume_campaign
from fid_imagegen.training import loop, phases
from fid_imagegen.training.checkpoint import load_groups
from fid_imagegen.training.loop import NonFiniteLossError, train
from fid_imagegen.training.runs import read_params
from fid_imagegen.training.writers import read_metrics


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture
def noted(monkeypatch):
    """The examples of every step, in the order they were read: [(step, index, hash of the pixels)]."""
    seen, batches = [], loop.pipeline.batches

    def note(*args, start_step, **kwargs):
        for step, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step):
            seen.append((step, tuple(batch["index"]), hashlib.sha256(batch["image"]).hexdigest()))
            yield batch

    monkeypatch.setattr(loop.pipeline, "batches", note)
    return seen


def test_a_run_leaves_what_it_promises(toy, tmp_path):
    config = toy(**{"log.every": 4, "log.sample_every": 3, "log.tensorboard": True, "ema_decays": (0.9, 0.99)})
    called = []

    def evaluate(task, params):
        called.append(np.asarray(params["generator"]["kernel"]))
        return {"score": 0.5}

    assert train(config, tmp_path, evaluators=(evaluate,))
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert sorted(lines) == [4, 6]  # every fourth, and the last
    assert lines[4].keys() >= {"loss", "gradient_norm", "images_per_second", "mean", "score"}
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "samples_0000003.png",
        "samples_0000006.png",
    ]
    assert "generator/kernel" in (tmp_path / "parameters.txt").read_text()
    assert "Total: 128" in (tmp_path / "parameters.txt").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "toy"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert steps(tmp_path) == [2, 4, 6]
    assert len(called) == 2 and not np.array_equal(*called)
    again = train(config, tmp_path, evaluators=(evaluate,))  # nothing left to do
    assert again and len(called) == 2 and sorted({line["step"] for line in read_metrics(tmp_path)}) == [4, 6]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 6])
def test_interrupted_at_any_step_and_restarted_is_uninterrupted(toy, tmp_path, stop_at, noted, stop):
    assert train(toy(), tmp_path / "whole")
    whole = list(noted)
    noted.clear()
    stop_at(stop)
    assert not train(toy(), tmp_path / "run")
    assert [step for step, *_ in noted] == list(range(stop))  # nothing fetched beyond the checkpoint
    stop_at(None)
    assert train(toy(), tmp_path / "run")
    assert noted == whole
    found = resume_campaign.last_state(tmp_path / "run")
    assert found == resume_campaign.last_state(tmp_path / "whole")
    kinds = (
        "params",
        "['tracked']['target']",
        "['ema']['0.9']",
        "['opt_state']",
        "['model_state']['seen']",
        "['step']",
    )
    assert all(any(kind in name for name in found) for kind in kinds)
    assert resume_campaign.losses(tmp_path / "run") == resume_campaign.losses(tmp_path / "whole")


def test_a_generator_resumes_bitwise(tiny, devices, tmp_path, stop_at, noted):
    devices(1)
    stop_at(3)
    assert not train(tiny(), tmp_path)
    stop_at(None)
    assert train(tiny(), tmp_path)
    resumed, read = resume_campaign.last_state(tmp_path), list(noted)
    assert train(tiny(), tmp_path / "whole")
    assert resumed == resume_campaign.last_state(tmp_path / "whole")
    assert read == noted[len(read) :]


def test_the_comparison_sees_a_lost_optimizer_and_a_shifted_sequence(toy, tmp_path, stop_at, noted, monkeypatch):
    """The tests above with planted faults."""
    train(toy(), tmp_path / "whole")
    whole, restore, batches = list(noted), loop.Run.restore, loop.Run.batches
    stop_at(3)
    train(toy(), tmp_path / "optimizer")
    train(toy(), tmp_path / "shifted")
    stop_at(None)

    def forget(run, checkpoints):
        state = restore(run, checkpoints)
        return state.replace(opt_state=run.initial().opt_state)

    monkeypatch.setattr(loop.Run, "restore", forget)
    train(toy(), tmp_path / "optimizer")
    monkeypatch.setattr(loop.Run, "restore", restore)
    noted.clear()
    monkeypatch.setattr(loop.Run, "batches", lambda run, start: batches(run, start + 1))
    train(toy(), tmp_path / "shifted")
    for fault in ("optimizer", "shifted"):
        assert resume_campaign.last_state(tmp_path / fault) != resume_campaign.last_state(tmp_path / "whole")
    assert noted != whole[3:]


@pytest.mark.parametrize("bad", [3, 4])
def test_a_step_that_is_not_finite_stops_the_run(toy, tmp_path, bad):
    """Step 4 is also a checkpoint's."""
    learn = toy.loss
    toy.loss = lambda params, x, step: learn(params, x, step) / jnp.where(step == bad - 1, 0.0, 1.0)
    with pytest.raises(NonFiniteLossError, match=rf"not finite at step {bad} \(loss inf") as error:
        train(toy(**{"log.every": 100}), tmp_path)
    assert f"the last finite values: step {bad - 1}, loss" in str(error.value)
    assert "gradient norm" in str(error.value) and "lower the learning rate" in str(error.value)
    assert steps(tmp_path) == [2]
    assert read_metrics(tmp_path)[-1]["step"] == bad  # its values are in the log
    toy.loss = learn
    assert train(toy(), tmp_path)  # what caused it is gone: on from step 2
    assert steps(tmp_path) == [2, 4, 6]


def test_parameters_that_overflow_after_a_finite_loss_are_not_saved(toy, tmp_path):
    """The loss of step 1 is finite, its update is not: seen one step later, checkpoint 1 would hold it."""
    config = toy(**{"optimizers.generator.learning_rate": 3e38, "checkpoint.every": 1})
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 1 .*the last finite values: none yet"):
        train(config, tmp_path)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(("start", "count"), [(1, 2), (4, 100)])
def test_the_profile_window_is_traced(toy, tmp_path, monkeypatch, start, count):
    """A window that reaches beyond the last step is closed at the end."""
    traced = []
    monkeypatch.setattr(loop.jax.profiler, "stop_trace", _counted(loop.jax.profiler.stop_trace, traced))
    assert train(toy(**{"profile.start": start, "profile.steps": count}), tmp_path)
    assert len(traced) == 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def _counted(function, calls):
    def call():
        calls.append(1)
        function()

    return call


def test_a_profile_window_entered_in_the_middle_is_traced_from_there(toy, tmp_path, stop_at):
    stop_at(3)
    train(toy(), tmp_path)
    stop_at(None)
    assert train(toy(**{"profile.start": 1, "profile.steps": 3}), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_phase_of_pre_training_comes_first_and_is_resumed(tiny, devices, tmp_path, stop_at):
    devices(1)
    changes = {"pretrain.num_steps": 4, "pretrain.batch_size": 8, "pretrain.checkpoint_every": 2, "num_steps": 2}
    # The second phase is the same program as the first, so that it compiles once; it starts from the first one's average.
    changes |= {"task": "reconstruction", "data.holdout_every": 4}
    config = tiny(
        **changes, **{f"optimizers.generator.{k}": v for k, v in tiny().pretrain.optimizers.generator.items()}
    )
    stop_at(3)
    assert not phases.run(config, tmp_path)
    assert steps(tmp_path / "pretrain") == [2, 3] and not (tmp_path / "checkpoints").exists()
    stop_at(None)
    assert phases.run(config, tmp_path)
    assert steps(tmp_path / "pretrain")[-1] == 4 and steps(tmp_path) == [2]
    assert any("held_out_psnr" in line for line in read_metrics(tmp_path / "pretrain"))
    _, pretrained = read_params(tmp_path / "pretrain")
    _, groups = load_groups(tmp_path)
    near = functools.partial(np.testing.assert_allclose, atol=1e-3)  # two steps of 1e-4 away
    jax.tree.map(near, groups["ema"]["0.9"], pretrained)
    with pytest.raises(ValueError, match=r"found config\.init\.generator='x' together with pretrain\.num_steps=4"):
        phases.run(tiny(**changes, **{"init.generator": "x"}), tmp_path / "other")
