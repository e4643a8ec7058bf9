"""The three stages as tasks: what each loss trains, what it leaves alone, and that sampling is one path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.tasks.latent import chance, variables
from fid_imagegen.tasks.text import drop_text, no_text

KEY = jax.random.key(0)
BATCH = 4


@functools.cache
def task(stage, **changes):
    config = wuerstchen.get_config("runlocal")
    config[stage].unlock()
    config[stage].update_from_flattened_dict(changes)
    return tasks.build(config[stage])


@functools.cache
def groups(stage):
    """(trained, statistics, everything with random frozen groups)."""
    made = task(stage)
    params, stats = jax.jit(made.init)(KEY)
    abstract = made.frozen()
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(7)  # jax would compile a program for each shape
    frozen = [jnp.asarray(0.2 * np.abs(rng.standard_normal(x.shape, np.float32)) + 0.1) for x in leaves]
    return params, stats, params | stats | jax.tree.unflatten(tree, frozen)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = np.array([[0, 5 + row, 9, 1, *[1] * 12] for row in range(BATCH)], np.int32)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (BATCH, 64, 64, 3), np.uint8)),
        "label": jnp.zeros(BATCH, jnp.int32),
        "row": jnp.arange(BATCH),
        "tokens": jnp.asarray(tokens),
        "mask": jnp.arange(16) < jnp.full((BATCH, 1), 4),
    }


@pytest.mark.parametrize("stage", ["stage_a", "stage_b", "stage_c"])
def test_a_loss_reaches_every_trained_group_and_tells_its_statistics(stage, batch):
    made, (params, stats, every) = task(stage), groups(stage)

    @jax.jit
    def gradient(params):
        frozen = {name: tree for name, tree in every.items() if name not in params and name not in stats}
        return jax.value_and_grad(lambda p: made.loss(p | frozen, stats, batch, KEY, jnp.int32(5)), has_aux=True)(
            params
        )

    (loss, (new, metrics)), grads = gradient(params)
    assert jnp.isfinite(loss) and all(jnp.isfinite(value) for value in metrics.values())
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    assert set(made.trained) == set(grads)
    if stats:
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), new, stats)
        assert any(jax.tree.leaves(moved))
    # Heads, gates and text branches start at zero: what lies behind them gets its first gradient a step later.
    for group in {"stage_a": ("vqgan", "discriminator"), "stage_b": ("stage_b",), "stage_c": ("stage_c",)}[stage]:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[group])) > 0


def test_each_side_of_stage_a_stops_at_the_other(batch):
    """With the adversarial weight at zero the tokenizer's gradient is that of reconstruction: the judge's loss adds nothing."""
    _, stats, _ = groups("stage_a")
    params = groups("stage_a")[0]

    def gradient(adversarial, start, side):
        made = task("stage_a", **{"objective.adversarial": adversarial, "objective.adversarial_start": start})
        other = {name: tree for name, tree in params.items() if name != side}
        loss = lambda p: made.loss({side: p} | other, stats, batch, KEY, jnp.int32(3))[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params[side])

    same = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), a, b)  # noqa: E731
    same(gradient(0.0, 0, "vqgan"), gradient(0.5, 4, "vqgan"))  # before its start
    same(gradient(0.0, 0, "discriminator"), gradient(0.5, 0, "discriminator"))  # the judge never learns to be fooled
    with pytest.raises(AssertionError):
        same(gradient(0.0, 0, "vqgan"), gradient(0.5, 3, "vqgan"))


def test_stage_b_disturbs_the_stated_shares():
    made = task("stage_b")
    latents = jnp.ones((4000, 1, 1, 2))
    disturbed = made.disturb(latents, example_keys(KEY, jnp.arange(4000)))
    zeroed, same = (jnp.all(disturbed == value, axis=(1, 2, 3)) for value in (0, 1))
    rates = made.config.disturbance
    assert float(zeroed.mean()) == pytest.approx(rates.zeroed, abs=0.012)
    assert float(same.mean()) == pytest.approx((1 - rates.zeroed) * (1 - rates.noised), abs=0.025)
    # a x 1 + sqrt(1 - a^2) x normal, its level uniform up to `noised_until`: a^2 is at least that of the end.
    noised = disturbed[~(zeroed | same)].ravel()
    signal = cosine.alpha_bar(rates.noised_until * jnp.linspace(0, 1, 1000))
    assert float(noised.mean()) == pytest.approx(float(jnp.sqrt(signal).mean()), abs=0.05)
    assert float(jnp.square(noised).mean()) == pytest.approx(1, abs=0.08)


def test_dropped_text_is_the_empty_text(batch):
    tokens, mask = drop_text(batch, jnp.array([True, False, True, False]))
    empty, shown = no_text(batch["tokens"])
    np.testing.assert_array_equal(empty, np.tile([0, *[1] * 15], (BATCH, 1)))
    np.testing.assert_array_equal(shown.sum(1), np.full(BATCH, 2))
    np.testing.assert_array_equal(tokens[::2], empty[::2])
    np.testing.assert_array_equal(tokens[1::2], batch["tokens"][1::2])
    np.testing.assert_array_equal(mask[::2], shown[::2])
    dropped = chance(example_keys(KEY, jnp.arange(4000)), 0.1)
    assert float(dropped.mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("scale", ["statistics", "published"])
def test_stage_c_scales_latents_there_and_back(scale, batch):
    made, (_, _, every) = task("stage_c", latent_scale=scale), groups("stage_c")
    images = batch["image"].astype(jnp.float32) / 255
    stats = {"batch_stats": every["compressor_stats"]["batch_stats"]}
    raw = made.compressor.apply({"params": every["compressor"], **stats}, images, False)
    latents = made.latents(every, images)
    np.testing.assert_allclose(made.unscaled(every, latents), raw, rtol=1e-4, atol=1e-4)
    if scale == "published":
        np.testing.assert_allclose(latents, (raw + 1) / 42, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["eps_ab", "v", "flow", "edm"])
def test_sampling_in_one_scan_is_sampling_step_by_step(form, batch):
    made, (_, _, every) = task("stage_c", form=form), groups("stage_c")
    noisy = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(KEY, x.shape), every["stage_c"]
    )  # its head starts at zero
    cond = made.condition(every, batch["tokens"], batch["mask"], None, jnp.float32(2))
    times, shape, index = cosine.sampling_times(3), (4, 4, 16), jnp.arange(BATCH)
    at_once = jax.jit(lambda p: made.denoiser.sample(p, cond, KEY, index, shape, times=times, scale=2.0))(noisy)
    x, noise = made.denoiser.start(KEY, index, shape), made.denoiser.noise(KEY, index, shape)
    for i in (1, 2, 3):
        x = made.denoiser.advance(noisy, cond, x, jnp.float32(times[i - 1]), jnp.float32(times[i]), noise(i), 2.0)
    np.testing.assert_allclose(x, at_once, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("stage", ["stage_a", "stage_b", "stage_c"])
def test_previews_have_their_shapes(stage, batch):
    made, every = task(stage), groups(stage)[2]
    (sheet,) = jax.eval_shape(made.preview, every, batch).values()
    assert sheet.shape == (2 * BATCH, *((4, 4, 3) if stage == "stage_c" else (64, 64, 3)))


def test_frozen_groups_are_what_the_stage_before_saves():
    """Stage B reads Stage A's variables, Stage C reads Stage B's compressor, by name and shape."""
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    for stage, before in (("stage_b", "stage_a"), ("stage_c", "stage_b")):
        params, stats, _ = groups(before)
        for name, tree in task(stage).frozen().items():
            assert shapes(tree) == shapes((params | stats)[name]), name
    assert set(variables(groups("stage_b")[2], "vqgan")) == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage_a", {"objective.perceptual": "vgg"}, "found perceptual distance 'vgg', expected 'lpips' or a stand-in"),
        ("stage_b", {"text.encoder": "t5"}, "found text encoder 't5', expected one of"),
        ("stage_b", {"compressor.name": "dino"}, "found compressor 'dino', expected one of"),
        ("stage_c", {"model.network": "mamba"}, "found network 'mamba', expected one of"),
        ("stage_c", {"latent_scale": "none"}, "found latent_scale 'none', expected 'statistics' or 'published'"),
        ("stage_c", {"form": "x0"}, "found prediction form 'x0', expected one of"),
    ],
)
def test_unknown_names_are_named(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        task(stage, **changes)
