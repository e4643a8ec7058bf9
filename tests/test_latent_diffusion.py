"""The baselines' pipeline with random weights: what an image depends on, where the first stage comes from, and refusals."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import wuerstchen
from fid_imagegen.pipelines import LatentDiffusionPipeline
from fid_imagegen.training import phases, runs

QUICK = {"num_inference_steps": 2, "progress": False}
STAGES = {"text_only": "stage_b", "ldm": "ldm"}


@pytest.fixture(scope="module", params=["ldm", pytest.param("text_only", marks=pytest.mark.slow)])
def pipe(request, random_model):
    return LatentDiffusionPipeline.from_pretrained(random_model(request.param) / STAGES[request.param])


def close(a, b):
    """Another batch sums in another order."""
    return np.abs(a.astype(int) - b).max() <= 1


def test_an_image_depends_on_its_seed_number_and_prompt_alone(pipe):
    together = pipe(["a red star", "a blue circle"], seed=3, **QUICK)
    assert together.shape == (2, 64, 64, 3) and together.dtype == np.uint8
    alone = pipe("a red star", seed=3, **QUICK)
    assert close(alone[0], together[0])
    assert not close(alone, pipe("a blue circle", seed=3, **QUICK))
    assert not close(alone, pipe("a red star", seed=4, **QUICK))
    twice = pipe("a red star", seed=3, num_images_per_prompt=2, **QUICK)
    assert close(twice[0], alone[0]) and not close(twice[0], twice[1])


def test_guidance_steers_from_the_negative_prompt(pipe):
    plain = pipe("a red star", guidance_scale=1.0, **QUICK)
    guided = pipe("a red star", guidance_scale=6.0, **QUICK)
    assert not close(plain, guided)
    assert not close(guided, pipe("a red star", guidance_scale=6.0, negative_prompt="a circle", **QUICK))
    assert close(guided, pipe("a red star", guidance_scale=6.0, negative_prompt="", **QUICK))
    # Steering away from what is asked for, at any scale, is no steering.
    assert close(plain, pipe("a red star", guidance_scale=6.0, negative_prompt="a red star", **QUICK))


def test_any_size_is_the_crop_of_the_next_step(pipe):
    step = {"stage_b": 16, "ldm": 8}[
        pipe.stage.config.task
    ]  # stride 4, and a U-net of two resolutions on patches of 2 or 1
    assert pipe.stage.step == step
    whole = pipe("a red star", height=80, width=48, **QUICK)
    np.testing.assert_array_equal(pipe("a red star", height=75, width=41, **QUICK), whole[:, :75, :41])


def test_the_first_stage_lies_beside_the_stage(random_model, tmp_path):
    root = random_model("text_only")
    shutil.copytree(root / "stage_b", tmp_path / "stage_b")
    with pytest.raises(FileNotFoundError, match="found no .*stage_a/config.json"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "stage_b")
    config = json.loads((tmp_path / "stage_b" / "config.json").read_text())
    config["init"]["vqgan"] = ""
    (tmp_path / "stage_b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="found no weights for the frozen group 'vqgan'"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "stage_b")


@pytest.mark.slow
def test_a_work_directory_is_a_pipeline(devices, tmp_path):
    devices(1)
    config = wuerstchen.get_config("text_only,runlocal").unlock()
    for stage in config.stages:
        config[stage].update({"num_steps": 1, "batch_size": 2})
        config[stage].log.num_samples = 1
    assert phases.run(config.lock(), tmp_path)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "stage_b")
    # The first stage is what the denoiser was trained on: the average of Stage A's run.
    _, first = runs.read_params(tmp_path / "stage_a")
    for name in ("vqgan", "vqgan_stats"):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(pipe.stage.groups[name]), first[name])
    assert pipe(["a red star", ""], **QUICK).shape == (2, 64, 64, 3)


def test_runs_of_another_kind_are_named(random_stages):
    for stage in ("stage_a", "stage_b", "stage_c"):
        with pytest.raises(
            ValueError, match=f"found a run of task '{stage}' .*expected an LDM or a Stage B on text alone"
        ):
            LatentDiffusionPipeline.from_pretrained(random_stages / stage)


@pytest.mark.parametrize(
    ("prompt", "changes", "error", "message"),
    [
        (["a star", None], {}, TypeError, "found None of type NoneType at position 1"),
        ([], {}, ValueError, "found 0 prompts"),
        ("a", {"height": 4}, ValueError, "found height 4 and width 64"),
        ("a", {"num_inference_steps": 1001}, ValueError, "found 1001 sampling steps"),
        (["a", "b", "c"], {"negative_prompt": ["d", "e"]}, ValueError, "found 2 negative prompts for 3 prompts"),
    ],
)
def test_bad_input_is_named(pipe, prompt, changes, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt, **QUICK | changes)
