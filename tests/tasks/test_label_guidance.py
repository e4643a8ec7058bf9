"""Labels that are dropped in training, and guidance by their absence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen.models.rendering import render
from fid_imagegen.pipelines import ImageFunctionPipeline, RenderableFunctions

DROPPED = {"model.num_classes": 3, "label_dropped": 0.25}
LABELS = jnp.asarray([2, 0, 1])


@pytest.fixture(scope="module")
def task(tiny_task):
    return tiny_task(DROPPED)


@pytest.fixture(scope="module")
def params(task, random_params):
    return random_params(task)


def test_a_share_of_the_labels_is_dropped_by_row(task):
    count = 4000
    batch = {"label": jnp.arange(count) % 3, "row": jnp.arange(count)}
    found = np.asarray(task._labels(batch, jax.random.key(0)))
    assert np.mean(found == 3) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(found[found < 3], np.asarray(batch["label"])[found < 3])
    part = task._labels(jax.tree.map(lambda x: x[100:200], batch), jax.random.key(0))
    np.testing.assert_array_equal(part, found[100:200])
    assert not np.array_equal(found, task._labels(batch, jax.random.key(1)))


@pytest.mark.parametrize(
    "changes", [{}, {"objective": common.objective("edm"), "distance": "l2"}, {"model.network": "dit"}]
)
def test_guidance_weighs_the_labelled_against_the_null(tiny_task, random_params, changes):
    changes = {"model.heads": 2, "model.depth": 1} | changes if "model.network" in changes else changes
    task = tiny_task(DROPPED | changes)
    params = random_params(task)
    draw = jax.jit(functools.partial(task.sample, steps=1), static_argnames="steps")
    at = lambda **asked: render(draw(params, jax.random.key(1), jnp.arange(3), **asked), 8, 8)  # noqa: E731
    labelled, null = at(label_B=LABELS), at(label_B=jnp.full(3, 3))
    assert np.abs(labelled - null).max() > 1e-3
    np.testing.assert_allclose(at(label_B=LABELS, guidance=1.0), labelled, atol=2e-5)
    np.testing.assert_allclose(at(label_B=LABELS, guidance=0.0), null, atol=2e-5)
    np.testing.assert_allclose(at(label_B=LABELS, guidance=2.5), null + 2.5 * (labelled - null), atol=1e-4)


def test_every_step_is_guided(task, params):
    """Two steps: the second one's input follows the first one's guidance, from the null to the labelled and beyond."""
    sample = jax.jit(functools.partial(task.sample, steps=2))
    draw = lambda **asked: sample(params, jax.random.key(1), jnp.arange(3), **asked).native.noisy  # noqa: E731
    none, weak, strong = (draw(guidance=scale) for scale in (0.0, 1.0, 3.0))
    np.testing.assert_allclose(none, draw(label_B=jnp.full(3, 3)), atol=1e-4)
    np.testing.assert_allclose(weak, draw(), atol=1e-4)
    np.testing.assert_allclose(strong, none + 3 * (weak - none), atol=1e-3)
    assert np.abs(weak - strong).max() > 1e-2


def test_guided_functions_are_saved_and_rendered_like_others(task, params, tmp_path):
    pipe = ImageFunctionPipeline(task.config, params)
    functions = pipe.generate(3, seed=1, labels=[2, 0, 1], guidance=2.0)
    functions.save(tmp_path / "f.safetensors")
    again = RenderableFunctions.load(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(functions.render(20, 13), again.render(20, 13))
    np.testing.assert_array_equal(functions[1:].render(8, 8), functions.render(8, 8)[1:])


def test_guidance_that_cannot_be(tiny_task, random_params):
    task = tiny_task({"model.num_classes": 3})
    with pytest.raises(
        ValueError, match="found guidance for a model that never saw the null class, .*label_dropped > 0"
    ):
        sample = functools.partial(task.sample, guidance=2.0)
        jax.eval_shape(sample, jax.eval_shape(lambda: random_params(task)), jax.random.key(0), jnp.arange(2))
    with pytest.raises(ValueError, match="found label_dropped 0.1 for a model without classes"):
        tiny_task({"label_dropped": 0.1})
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"found label_dropped {share}, expected a share from 0 to 1"):
            tiny_task({"model.num_classes": 3, "label_dropped": share})
