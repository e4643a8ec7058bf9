"""The previewer as a task: what it is trained on, and that it decodes what Stage C makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import wuerstchen
from fid_imagegen import tasks

KEY = jax.random.key(0)
BATCH = 4


@functools.cache
def task(**changes):
    config = wuerstchen.get_config("previewer,runlocal").previewer
    config.unlock()
    config.update_from_flattened_dict(changes)
    return tasks.build(config)


@functools.cache
def groups():
    """(trained, statistics, a frozen compressor whose latents have some other scale than 1)."""
    params, stats = jax.jit(task().init)(KEY)
    made = jax.jit(task().compressor.init, static_argnums=2)(KEY, jnp.zeros((1, 64, 64, 3)), False)
    moments = {"mean": jnp.linspace(-2, 2, 16), "variance": jnp.linspace(0.2, 4, 16)}
    compressor_stats = {"batch_stats": made["batch_stats"], "latents": moments}
    return params, stats, {"compressor": made["params"], "compressor_stats": compressor_stats}


@pytest.fixture
def batch():
    images = np.array([20, 60, 200, 240], np.uint8)[:, None, None, None]
    return {"image": jnp.asarray(np.tile(images, (1, 64, 64, 3))), "row": jnp.arange(BATCH)}


def test_it_learns_the_brightness_of_plain_pictures(batch):
    params, stats, frozen = groups()
    made, optimizer = task(), optax.adam(1e-2)

    @jax.jit
    def step(params, stats, state):
        loss = lambda p: made.loss(p | frozen, stats, batch, KEY, jnp.int32(0))  # noqa: E731
        (_, (new, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), new, state, metrics

    state, psnr = optimizer.init(params), []
    for _ in range(60):
        params, new, state, metrics = step(params, stats, state)
        assert jax.tree.structure(new) == jax.tree.structure(stats)  # the frozen compressor's are not among them
        stats = new
        psnr.append(float(metrics["psnr"]))
    assert psnr[-1] > psnr[0] + 6 and set(stats) == {"previewer_stats"}
    sheet = jax.jit(made.preview)(params | stats | frozen, batch)["previews"]
    truth, decoded = sheet[::2], sheet[1::2]
    np.testing.assert_allclose(truth, np.broadcast_to(batch["image"][:, :1, :1] / 127.5 - 1, truth.shape), atol=0.01)
    assert float(jnp.mean(decoded[2:])) > float(jnp.mean(decoded[:2])) + 0.5  # and not the other way round


@pytest.mark.parametrize("scale", ["statistics", "published"])
def test_it_decodes_the_compressors_latents_at_the_scale_it_was_trained_with(scale, batch):
    made, (params, stats, frozen) = task(latent_scale=scale), groups()
    every = params | stats | frozen
    seen = jax.random.normal(KEY, (2, 4, 4, 16))
    direct = made.model.apply({"params": params["previewer"], **stats["previewer_stats"]}, seen, False)
    decoded = made.decode(every, made.unscaled(every, seen))
    np.testing.assert_allclose(decoded, np.clip(direct, 0, 1), atol=1e-4)
    assert not np.allclose(made.decode(every, seen), decoded, atol=1e-3)  # Stage C's own scale is another


def test_previews_have_eight_pixels_a_position():
    published = tasks.build(wuerstchen.get_config("previewer").previewer)
    assert (published.rows, published.size) == (24, 192)
    params, stats = jax.eval_shape(published.init, KEY)
    assert sum(x.size for x in jax.tree.leaves(params)) == 3_979_651  # the authors' count, in torch without statistics
    every = params | stats | {name: tree for name, tree in published_frozen(published).items() if name != "lpips"}
    image = jax.ShapeDtypeStruct((2, 1024, 1024, 3), jnp.uint8)
    (sheet,) = jax.eval_shape(published.preview, every, {"image": image}).values()
    assert sheet.shape == (4, 192, 192, 3)


def published_frozen(made):
    """Without LPIPS, whose weights are not at hand."""
    made.perceptual.name = "laplacian"
    return made.frozen()


def test_an_unknown_distance_is_named():
    with pytest.raises(ValueError, match="found perceptual distance 'vgg'"):
        task(**{"objective.perceptual": "vgg"})
