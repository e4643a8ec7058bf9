"""The baselines as tasks: the LDM of App. E.4 on either first stage, and Stage B on text alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.interop import autoencoder_kl
from fid_imagegen.tasks.first_stage import build_first_stage
from fid_imagegen.tasks.text import no_text

KEY = jax.random.key(0)
BATCH = 4
BASELINES = {"ldm": "ldm", "text_only": "stage_b"}
KL = {"network": "kl", "scaling_factor": 0.18215, "in_channels": 3, "latent_channels": 4, "dtype": "float32"}
KL |= {"weights": "", "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
OTHER_TEXT = lambda batch: batch | {"tokens": batch["tokens"][::-1]}  # noqa: E731


# One resolution: it compiles in a third of the time.
SMALL = {
    "ldm": {"widths": (16,), "heads": (2,), "blocks": (1,)},
    "text_only": {
        "c_hidden": (16,),
        "nhead": (2,),
        "blocks": (1,),
        "level_config": ("CTA",),
        "inject_effnet": (False,),
    },
}


def config(variant, **changes):
    made = wuerstchen.get_config(f"{variant},runlocal")[BASELINES[variant]]
    made.unlock()
    made.model.update(SMALL[variant])
    made.text.layers = 1
    made.update_from_flattened_dict(changes)
    return made


def drawn(tree, seed):
    """Random weights, all above zero, so that variances are: jax would compile a program for each shape."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 + 0.1 * np.abs(rng.standard_normal(x.shape)), x.dtype), tree)


@functools.cache
def made(variant):
    """(task, trained groups, all groups with frozen ones): random, because heads start at zero."""
    task = tasks.build(config(variant))
    params, stats = jax.eval_shape(task.init, KEY)
    assert stats == {}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), params)
    return task, params, params | drawn(task.frozen(), 7)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = np.array([[0, 5 + row, 9, 1, *[1] * 12] for row in range(BATCH)], np.int32)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (BATCH, 64, 64, 3), np.uint8)),
        "row": jnp.arange(BATCH),
        "tokens": jnp.asarray(tokens),
        "mask": jnp.arange(16) < jnp.full((BATCH, 1), 4),
    }


@pytest.mark.parametrize("variant", BASELINES)
def test_a_loss_reaches_network_and_text_and_changes_no_statistics(variant, batch):
    task, params, every = made(variant)
    frozen = {name: tree for name, tree in every.items() if name not in params}
    assert set(params) == set(task.trained) == {BASELINES[variant], "text"}
    assert set(frozen) == {"vqgan", "vqgan_stats"}
    loss = lambda p, batch: task.loss(p | frozen, {}, batch, KEY, jnp.int32(5))  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (stats, metrics)), grads = gradient(params, batch)
    assert jnp.isfinite(value) and stats == {} and float(metrics["latent_deviation"]) > 0
    for group in task.trained:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[group])) > 0, group
    assert float(gradient(params, OTHER_TEXT(batch))[0][0]) != float(value)


@pytest.mark.parametrize("variant", BASELINES)
def test_text_that_is_always_dropped_does_not_count(variant, batch):
    rate = {"ldm": "text_dropped", "text_only": "disturbance.text_dropped"}[variant]
    loss = jax.jit(tasks.build(config(variant, **{rate: 1.0})).loss)
    value, other = (loss(made(variant)[2], {}, rows, KEY, jnp.int32(0))[0] for rows in (batch, OTHER_TEXT(batch)))
    assert float(value) == float(other)


@pytest.mark.parametrize("variant", BASELINES)
def test_guidance_follows_the_text_and_leaves_the_negative(variant, batch):
    """Guided conditions are those of the texts, then those of `negative`, the empty text by default."""
    task, _, every = made(variant)
    text, rows = (batch["tokens"], batch["mask"]), (16, 16)
    condition = jax.jit(functools.partial(task.condition, latent_hw=rows))
    of = lambda text: condition(every, None, *text, None, scale=None)  # noqa: E731
    # Keys and values are [layers, batch, ...] of scanned blocks and [batch, ...] of single ones.
    sizes = {BATCH, 2 * BATCH}
    joined = lambda a, b: jax.tree.map(  # noqa: E731
        lambda x, y: np.concatenate([x, y], axis=next(i for i, n in enumerate(x.shape) if n in sizes)), of(a), of(b)
    )
    other = (batch["tokens"][::-1], batch["mask"])
    for negative, expected in ((None, no_text(batch["tokens"])), (other, other)):
        guided = condition(every, None, *text, negative, scale=jnp.float32(2))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), guided, joined(text, expected))


@pytest.mark.parametrize("variant", BASELINES)
def test_previews_pair_pictures_with_samples(variant, batch):
    task, _, every = made(variant)
    (sheet,) = jax.eval_shape(task.preview, every, batch).values()
    assert sheet.shape == (2 * BATCH, 64, 64, 3)


@pytest.mark.parametrize("network", ["kl", "vqgan"])
def test_a_first_stage_scales_its_latents_there_and_back(network, tmp_path):
    fields = KL if network == "kl" else dict(config("ldm").first_stage) | {"scaling_factor": 0.5}
    first = build_first_stage(ConfigDict(fields))
    if network == "kl":
        weights = drawn(autoencoder_kl.abstract_params(first.model), 3)
        first.weights = tmp_path / "vae.safetensors"
        safetensors.numpy.save_file(autoencoder_kl.to_state_dict(weights), first.weights)
        groups = first.frozen()
        jax.tree.map(np.testing.assert_array_equal, groups, {"autoencoder": weights})
    else:
        groups = drawn(first.frozen(), 3)
    images, model = jax.random.uniform(KEY, (2, 8, 8, 3)), first.model
    name = {"kl": "autoencoder", "vqgan": "vqgan"}[network]

    @jax.jit
    def run(groups):
        weights = {"params": groups[name]} | groups.get("vqgan_stats", {})
        if network == "kl":  # of images in [-1, 1], the mean alone
            raw = model.apply(weights, 2 * images - 1, method=model.encode)[0]
            back = (model.apply(weights, raw, method=model.decode) + 1) / 2
        else:
            raw = model.apply(weights, images, False, method=model.encode)
            back = model.apply(weights, raw, method=model.decode)
        latents = first.encode(groups, images)
        return raw, back, latents, first.decode(groups, latents)

    raw, back, latents, decoded = run(groups)
    assert latents.shape == (2, 8 // first.stride, 8 // first.stride, first.channels)
    np.testing.assert_allclose(latents, fields["scaling_factor"] * raw, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decoded, np.clip(back, 0, 1), rtol=1e-4, atol=1e-5)


def test_the_baseline_is_the_published():
    stage = wuerstchen.get_config("ldm").ldm
    assert (stage.first_stage.scaling_factor, stage.batch_size, stage.num_steps) == (0.18215, 1280, 1_500_000)
    task = tasks.build(stage)
    params, _ = jax.eval_shape(task.init, KEY)
    assert 0.98e9 < sum(x.size for x in jax.tree.leaves(params["ldm"])) < 1e9
    frozen = autoencoder_kl.abstract_params(task.first_stage.model)
    assert sum(x.size for x in jax.tree.leaves(frozen)) == 83_653_863
    with pytest.raises(FileNotFoundError, match="found no file '.*', expected an AutoencoderKL of diffusers"):
        task.frozen()


def test_a_baseline_sees_as_many_images_as_both_stages():
    usual, alone = wuerstchen.get_config(), wuerstchen.get_config("text_only")
    images = lambda stage: stage.num_steps * stage.batch_size  # noqa: E731
    assert alone.stages == ("stage_a", "stage_b")
    assert images(alone.stage_b) == pytest.approx(images(usual.stage_b) + images(usual.stage_c), rel=1e-3)
    params, stats = jax.eval_shape(tasks.build(alone.stage_b).init, KEY)
    assert set(params) == {"stage_b"} and stats == {}  # CLIP is frozen, and there is no compressor


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("ldm", {"text.encoder": "none"}, "found text encoder 'none', expected one"),
        ("ldm", {"first_stage.network": "vae"}, "found first stage 'vae', expected one of"),
        ("ldm", {"form": "x0"}, "found prediction form 'x0'"),
        ("text_only", {"text.encoder": "none"}, "found a Stage B with neither compressor latents nor text"),
    ],
)
def test_what_cannot_be_is_named(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(config(variant, **changes))
