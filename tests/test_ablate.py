"""The ablations with random weights: each changes what it says and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fid_imagegen.data.shapes import held_out_prompts, render
from fid_imagegen.evaluation import ablations
from fid_imagegen.pipelines import LatentDiffusionPipeline, WuerstchenPipeline
from fid_imagegen.pipelines.text import Stage

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module", autouse=True)
def short_sweeps():
    """Sweeps of one value each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "GUIDANCE", (2.0,))
        patch.setattr(ablations, "STEPS", (2,))
        yield


@pytest.fixture(scope="module")
def pipe(random_model):
    return WuerstchenPipeline.from_pretrained(random_model("previewer"))


@pytest.fixture(scope="module")
def pictures(pipe, random_model):
    """pictures(prompts) -> {(ablation, setting): images}."""

    def make(prompts):
        previewer = ablations.load_previewer(random_model("previewer") / "previewer", pipe)
        return {(p.ablation, p.setting): p.images for p in ablations.wuerstchen_ablations(pipe, previewer, prompts, 3)}

    return make


def test_every_ablation_is_what_the_pipeline_draws_when_asked_for_it(pipe, pictures):
    found, draw = pictures(PROMPTS), lambda prompts, **asked: pipe(prompts, seed=3, progress=False, **asked)  # noqa: E731
    expected = {
        ("", "as trained"): draw(PROMPTS),
        ("text", "none in C"): draw(["", ""]),  # this Stage B reads none
        ("prior_guidance", "2"): draw(PROMPTS, prior_guidance_scale=2.0),
        ("prior_steps", "2"): draw(PROMPTS, prior_num_inference_steps=2),
        ("decoder_guidance", "2"): draw(PROMPTS, decoder_guidance_scale=2.0),
        ("decoder_steps", "2"): draw(PROMPTS, num_inference_steps=2),
    }
    assert set(found) == {*expected, ("latents", "none in B"), ("previewer", "previewed")}
    for name, images in expected.items():
        np.testing.assert_array_equal(found[name], images, str(name))
        assert name == ("", "as trained") or not np.array_equal(images, expected[("", "as trained")]), name


def test_without_its_condition_a_picture_knows_no_prompt(pictures):
    one, other = pictures(PROMPTS), pictures(PROMPTS[::-1])
    for name in one:
        blind = name in (("text", "none in C"), ("latents", "none in B"))
        assert np.array_equal(one[name], other[name]) == blind, name


def test_the_previewer_decodes_what_stage_c_made(pipe, pictures, random_model):
    images = pictures(PROMPTS)[("previewer", "previewed")]
    stage = Stage(random_model("previewer") / "previewer")
    small = stage.task.decode(stage.groups | pipe.stage_b.groups, pipe.latents(PROMPTS, seed=3))
    assert small.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(images, 255 * jax.image.resize(small, (2, 64, 64, 3), "bilinear"), atol=0.51)


def test_a_baseline_has_text_guidance_and_steps(random_model):
    pipe = LatentDiffusionPipeline.from_pretrained(random_model("text_only") / "stage_b")
    found = {(p.ablation, p.setting): p.images for p in ablations.baseline_ablations(pipe, PROMPTS, 3)}
    draw = lambda prompts, **asked: pipe(prompts, seed=3, progress=False, **asked)  # noqa: E731
    expected = {
        ("", "as trained"): draw(PROMPTS),
        ("text", "none"): draw(["", ""]),
        ("guidance", "2"): draw(PROMPTS, guidance_scale=2.0),
        ("steps", "2"): draw(PROMPTS, num_inference_steps=2),
    }
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], images) for name, images in expected.items())


def test_numbers_of_equal_other_and_true_pictures():
    scenes = held_out_prompts(12)
    truth = np.stack([render(scene, 64) for scene in scenes])
    assert ablations.measure(truth, truth, None) == {"psnr": None}
    found = ablations.measure(truth, truth ^ 1, scenes)  # every value differs by one
    assert found["psnr"] == pytest.approx(20 * np.log10(255)) and found["alignment"]["all"] >= 0.9


def test_the_command_writes_sheets_and_numbers(random_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")

    def run(*flags):
        command = [sys.executable, "-m", "fid_imagegen.ablate", f"--out={tmp_path / 'out'}", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(f"--model={random_model('text_only') / 'stage_b'}", f"--prompts={tmp_path / 'prompts.txt'}")
    assert done.returncode == 0, done.stderr
    names = {"text", "guidance", "steps"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ablations.json",
        "prompts.png",
        *(f"{name}.png" for name in names),
    }
    report = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert report["prompts"] == PROMPTS and set(report["ablations"]) == names
    assert len(report["ablations"]["steps"]) > 2 and "alignment" not in report["as_trained"]
