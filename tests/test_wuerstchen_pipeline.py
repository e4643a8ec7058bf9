"""Text to image with random weights: shapes, sizes, what an image depends on, and refusals."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.evaluation.stages import cost_table, parameter_table
from fid_imagegen.pipelines import WuerstchenPipeline

QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe(random_stages):
    return WuerstchenPipeline.from_pretrained(random_stages)


def test_an_image_depends_on_its_seed_number_and_prompt_alone(pipe):
    together = pipe(["a red star", "a blue circle"], seed=3, **QUICK)
    assert together.shape == (2, 64, 64, 3) and together.dtype == np.uint8
    alone = pipe("a red star", seed=3, **QUICK)
    assert np.abs(alone[0].astype(int) - together[0]).max() <= 1  # another batch sums in another order
    assert not np.array_equal(alone, pipe("a blue circle", seed=3, **QUICK))
    assert not np.array_equal(alone, pipe("a red star", seed=4, **QUICK))
    np.testing.assert_array_equal(alone, pipe("a red star", seed=3, **QUICK))
    assert set(pipe.seconds) == {"stage_a", "stage_b", "stage_c"}


def test_any_size_is_the_crop_of_the_next_step(pipe):
    assert pipe.step == 16
    cropped = pipe("a red star", height=70, width=97, **QUICK)
    assert cropped.shape == (1, 70, 97, 3)
    np.testing.assert_array_equal(cropped, pipe("a red star", height=80, width=112, **QUICK)[:, :70, :97])


def test_guidance_and_negative_prompts_count(pipe):
    plain = pipe("a red star", prior_guidance_scale=1.0, **QUICK)
    guided = pipe("a red star", prior_guidance_scale=5.0, **QUICK)
    assert not np.array_equal(plain, guided)
    assert not np.array_equal(guided, pipe("a red star", prior_guidance_scale=5.0, negative_prompt="a circle", **QUICK))
    # Steering away from what is asked for, at any scale, is no steering.
    itself = pipe("a red star", prior_guidance_scale=5.0, negative_prompt="a red star", **QUICK)
    assert np.abs(itself.astype(int) - plain).max() <= 1


def test_several_images_of_each_prompt_stand_together(pipe):
    four = pipe(["a red star", "a blue circle"], num_images_per_prompt=2, seed=1, **QUICK)
    listed = pipe(["a red star", "a red star", "a blue circle", "a blue circle"], seed=1, **QUICK)
    np.testing.assert_array_equal(four, listed)
    assert not np.array_equal(four[0], four[1])


def test_an_empty_prompt_will_do_and_a_long_one_is_cut(pipe):
    assert pipe("", **QUICK).shape == (1, 64, 64, 3)
    with pytest.warns(UserWarning, match="found a text of more than 16 tokens, cut"):
        pipe("a red star at the top left " * 10, **QUICK)


@pytest.mark.parametrize(
    ("prompt", "changes", "error", "message"),
    [
        (7, {}, TypeError, "found 7 of type int at position 0, expected a string"),
        (["a star", None], {}, TypeError, "found None of type NoneType at position 1"),
        ([], {}, ValueError, "found 0 prompts"),
        ("a", {"num_images_per_prompt": 0}, ValueError, "found 1 prompts, 0 images each"),
        ("a", {"height": 8}, ValueError, "found height 8 and width 64, expected at least 16 each"),
        ("a", {"height": 10**5, "width": 10**5}, ValueError, "at most 16,777,216 pixels"),
        ("a", {"num_inference_steps": 0}, ValueError, "found 0 sampling steps"),
        (["a", "b", "c"], {"negative_prompt": ["d", "e"]}, ValueError, "found 2 negative prompts for 3 prompts"),
    ],
)
def test_bad_input_is_named(pipe, prompt, changes, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt, **QUICK | changes)


def test_a_folder_without_a_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no .*stage_a/config.json"):
        WuerstchenPipeline.from_pretrained(tmp_path)


def test_tables_count_every_group_and_every_pass(pipe):
    counts = parameter_table(pipe)
    assert counts.pop("all") == sum(counts.values())
    assert {"stage A: vqgan", "stage B: stage_b", "stage B: compressor", "stage C: stage_c", "stage C: text"} == set(
        counts
    )
    small, large = cost_table(pipe, None, None), cost_table(pipe, 128, 128)
    assert 3.5 < large["stage A, decoding"] / small["stage A, decoding"] < 4.5  # four times the pixels
    assert small["sampling as the config says"] > 12 * small["stage B, one pass"]


def test_the_public_model_costs_what_its_pytorch_form_does():
    """torch's flop counter at 1024 px, without what is neither matrix product nor convolution: shared/reference/wuerstchen.md."""
    config, made = wuerstchen.get_config("published,b_no_text"), {}
    for stage in config.stages:
        task = tasks.build(config[stage])
        params, stats = jax.eval_shape(task.init, jax.random.key(0))
        made[stage] = SimpleNamespace(config=config[stage], task=task, groups=params | stats)
    made["stage_b"].groups |= {name: made["stage_a"].groups[name] for name in ("vqgan", "vqgan_stats")}
    pipe = SimpleNamespace(stage_b=made["stage_b"], stage_c=made["stage_c"], step=128)
    found = cost_table(pipe, 1024, 1024)
    expected = {"stage C, one pass": 1.154e12, "stage B, one pass": 2.858e12, "stage A, decoding": 2.172e12}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.05)
