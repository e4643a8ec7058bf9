import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fid_imagegen.models.rendering import render
from fid_imagegen.tasks.generator import to_float
from fid_imagegen.tasks.reconstruction import rendered_psnr

RECONSTRUCTION = {"task": "reconstruction", "variational": False}


@pytest.fixture(scope="module")
def untrained(tiny_task):
    return jax.jit(tiny_task(RECONSTRUCTION).init)(jax.random.key(0))[0]["generator"]


@pytest.mark.parametrize("form", ["edm", "x0_blend"])
def test_an_untrained_trunk_in_front_changes_nothing(tiny_task, random_params, untrained, batch, form):
    """Held-out PSNR to 0.01 dB: pre-training goes on seamlessly as consistency training."""
    task = tiny_task(RECONSTRUCTION | {"preconditioning": form})
    predictor = jax.tree.map(lambda x: 3 * x, random_params(task)["generator"])
    params = {"generator": predictor | {"extractor": untrained["extractor"]}}
    alone = rendered_psnr(task, params, batch["image"])
    assert rendered_psnr(task, params, batch["image"], trunk=True) == pytest.approx(alone, abs=0.01)
    if form == "edm":  # what a trunk does would be seen
        opened = rendered_psnr(task, {"generator": predictor}, batch["image"], trunk=True)
        assert abs(opened - alone) > 0.05


@pytest.mark.parametrize(("form", "scale"), [("edm", 0.5), ("x0_blend", 1.0)])
def test_the_function_stands_for_the_image_over_the_clean_scale(tiny_task, random_params, batch, form, scale):
    task = tiny_task(RECONSTRUCTION | {"preconditioning": form})
    params, x0 = random_params(task), to_float(batch["image"])

    @jax.jit  # one program for all three
    def run(params):
        loss = task.loss(params, {}, batch, jax.random.key(0), jnp.asarray(0))
        return task.reconstruct(params, x0), loss, task.preview(params, batch)

    functions, (loss, (_, metrics)), previews = run(params)
    values = render(functions, 8, 8)
    np.testing.assert_allclose(values, scale * render(functions.replace(native=None), 8, 8), atol=1e-5)
    assert float(loss) == pytest.approx(np.mean((values - np.asarray(x0)) ** 2), rel=1e-4)
    assert float(metrics["psnr"]) == pytest.approx(10 * np.log10(4 / float(loss)), rel=1e-4)
    np.testing.assert_allclose(previews["reconstructions"][::2], x0, atol=1e-6)
    np.testing.assert_allclose(previews["reconstructions"][1::2], values, atol=1e-5)


def test_pre_training_learns_and_leaves_the_trunk_alone(tiny_task, untrained):
    task, optimizer = tiny_task(RECONSTRUCTION), optax.adam(1e-2)
    slope = np.add.outer(np.arange(8), np.arange(8))[None, ..., None]
    batch = {
        "image": jnp.asarray(18 * np.concatenate([slope, slope[:, ::-1], slope[:, :, ::-1], 14 - slope]), jnp.uint8)
    }

    def step(carry, number):
        params, state = carry
        loss = lambda p: task.loss({"generator": p}, {}, batch, jax.random.key(0), number)[0]  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(100)))
    (after, _), losses = run(untrained)
    assert losses[-1] < 0.3 * losses[0]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), untrained, after)
    moved = {name: any(jax.tree.leaves(tree)) for name, tree in moved.items()}
    assert moved == {"extractor": False, "patches": True, "predictor": True, "function": True}


def test_a_predictor_cannot_sample(tiny_task):
    with pytest.raises(
        ValueError, match="found a reconstruction run, expected a generator: train the consistency task"
    ):
        tiny_task(RECONSTRUCTION).sample({}, None, None)
