"""Functions held to images of another size than the grid of their noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen.data.transforms import resize_and_crop
from fid_imagegen.diffusion.noise import example_normal
from fid_imagegen.models.image_function import pixel_cell, pixel_grid
from fid_imagegen.models.rendering import render
from fid_imagegen.models.resampling import resample
from fid_imagegen.tasks.generator import to_float
from fid_imagegen.tasks.windows import Windows, draw_windows, on_grid

KEYS = jax.random.split(jax.random.key(0), 3)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 2)), jnp.float32)
WINDOWS = Windows(grid=4, window=6, size=jnp.asarray(16), corner_2=jnp.asarray([3, 9]))
LARGE = {"data.image_size": 16, "grid": 8, "window": 6, "variational": False}


def test_clean_pixels_are_the_grid_and_the_window():
    found = WINDOWS.clean(IMAGES)
    assert found.shape == (3, 16 + 36, 1, 2)
    np.testing.assert_allclose(found[:, :16, 0].reshape(3, 4, 4, 2), on_grid(IMAGES, 4), atol=1e-6)
    np.testing.assert_allclose(found[:, 16:, 0].reshape(3, 6, 6, 2), IMAGES[:, 3:9, 9:15], atol=1e-5)


def test_a_window_of_a_smaller_target_is_cut_from_the_whole_resized():
    windows = Windows(grid=4, window=6, size=jnp.asarray(11), corner_2=jnp.asarray([0, 5]))
    whole = jax.image.resize(IMAGES, (3, 11, 11, 2), "cubic", antialias=True)
    found = windows.clean(IMAGES)[:, 16:, 0].reshape(3, 6, 6, 2)
    np.testing.assert_allclose(found, whole[:, :6, 5:], atol=1e-5)
    np.testing.assert_allclose(
        windows.coordinates.reshape(6, 6, 2), pixel_grid(11, 11).reshape(11, 11, 2)[:6, 5:], atol=1e-6
    )
    np.testing.assert_allclose(windows.cell, pixel_cell(11, 11), rtol=1e-6)


@pytest.mark.parametrize(("grid", "window", "smallest"), [(8, 6, 8), (8, 12, 12), (8, 0, 16), (32, 6, 16)])
def test_sizes_and_places_are_drawn(tiny_task, grid, window, smallest):
    config = tiny_task(LARGE | {"grid": grid, "window": window}).config

    def draw(key):
        windows = draw_windows(config, key)
        return windows.size, windows.size - windows.window, windows.corner_2

    sizes, last, corners = map(np.asarray, jax.vmap(draw)(jax.random.split(jax.random.key(0), 400)))
    assert set(sizes.tolist()) == set(range(smallest, 17))
    assert (corners >= 0).all() and (corners <= last[:, None]).all()
    if window:
        assert (corners == 0).any() and (corners == last[:, None])[last > 0].any()
        places = (corners / np.maximum(last, 1)[:, None])[last > 0]
        assert np.abs(np.corrcoef(places.T)[0, 1]) < 0.2  # down and across are drawn apart


def test_images_are_shrunk_as_data_are_when_they_are_read():
    images = np.random.default_rng(0).integers(50, 206, (2, 16, 16, 3), dtype=np.uint8)
    found, read = on_grid(jnp.asarray(images, jnp.float32), 5), np.stack([resize_and_crop(x, (5, 5)) for x in images])
    np.testing.assert_allclose(found, read, atol=1.01)  # PIL rounds between its two passes, and after


def test_noise_of_the_window_is_that_of_the_grid():
    """On a window of the grid's own pixels it is the same; in between it is interpolated, and its key an image's own."""
    noise = lambda windows, keys=KEYS: jax.jit(lambda: windows.noise(keys, (0, 1, 2)))()  # noqa: E731
    same = noise(Windows(grid=16, window=6, size=jnp.asarray(16), corner_2=jnp.asarray([3, 9])))
    z = example_normal(KEYS, (16, 16, 2))
    np.testing.assert_allclose(same[:, :256, 0].reshape(z.shape), z, atol=1e-6)
    np.testing.assert_allclose(same[:, 256:, 0].reshape(3, 6, 6, 2), z[:, 3:9, 9:15], atol=1e-5)
    fine, part = noise(WINDOWS), noise(WINDOWS, KEYS[1:])
    np.testing.assert_allclose(fine[1:], part, atol=1e-6)
    assert 0.3 < float(fine[:, 16:].std()) < 1.3
    # Where the grid is finer than the image, a pixel of it takes several of the grid's.
    coarse = noise(Windows(grid=16, window=8, size=jnp.asarray(8), corner_2=jnp.asarray([0, 0])))[:, 256:, 0]
    expected = resample(z, jnp.asarray(pixel_grid(8, 8)), jnp.asarray(pixel_cell(8, 8)))
    np.testing.assert_allclose(coarse, expected, atol=1e-5)


@pytest.mark.parametrize("integrated", [False, True])  # True: of use to a function is the footprint of a pixel too
def test_values_are_those_of_a_render(tiny_task, random_params, integrated):
    task = tiny_task(LARGE | {"model.integrated": integrated})
    params = random_params(task)
    windows = Windows(grid=8, window=6, size=jnp.asarray(16), corner_2=jnp.asarray([3, 9]))
    functions = jax.jit(task.sample)(params, jax.random.key(1), jnp.arange(2)).replace(native=None)
    found = jax.jit(functools.partial(windows.render, chunk=4096))(functions)
    np.testing.assert_allclose(found[:, :64, 0].reshape(2, 8, 8, 1), render(functions, 8, 8), atol=1e-5)
    np.testing.assert_allclose(found[:, 64:, 0].reshape(2, 6, 6, 1), render(functions, 16, 16)[:, 3:9, 9:15], atol=1e-5)


def test_the_objective_is_given_the_noise_of_the_window_that_it_is_shown(tiny_task, random_params, monkeypatch):
    task, seen = tiny_task(LARGE), {}

    def objective(distance, **more):
        return lambda nets, x0, labels, **keys: seen.update(more, x0=x0) or (jnp.zeros(4), {})

    monkeypatch.setattr(task, "_objective", objective)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(4, jnp.int32), "row": jnp.arange(4)}
    task.loss(random_params(task), {}, batch, jax.random.key(0), jnp.asarray(0))
    windows = seen["draw"].__self__
    assert seen["draw"].__func__ is Windows.noise
    np.testing.assert_allclose(seen["x0"], windows.clean(to_float(batch["image"])))


def test_the_net_is_told_the_label_and_drops_out_in_training_alone(tiny_task, random_params):
    task = tiny_task(LARGE | {"model.num_classes": 3, "model.dropout": 0.5})
    params, windows = random_params(task)["generator"], Windows(8, 6, jnp.asarray(16), jnp.asarray([3, 9]))
    x, levels = example_normal(KEYS, (64 + 36, 1, 1)), jnp.zeros((3, 1))

    def bound(training):
        net = jax.jit(windows.net(task.model, params, training=training, chunk=4096))
        return lambda label, key: net(x, levels, jnp.full(3, label), key=jax.random.key(key))

    still, train = bound(training=False), bound(training=True)
    np.testing.assert_array_equal(still(0, 0), still(0, 1))
    np.testing.assert_array_equal(train(0, 0), train(0, 0))
    for one, other in ((still(0, 0), still(1, 0)), (still(0, 0), train(0, 0)), (train(0, 0), train(0, 1))):
        assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "network"),
    [("ect", "function"), ("ect", "dit"), ("sct", "function"), ("sct", "dit"), ("reconstruction", "function")],
)
def test_what_lies_between_the_grids_pixels_is_learned(tiny_task, random_params, name, network):
    """The loss sees the image where the grid does not: another image of the same grid pixels has another loss."""
    changes = LARGE | {
        "window": 0,
        "model.network": network,
        "model.depth": 1,
        "objective": common.objective("ect"),
        "distance": "l2",
    }
    if name == "sct":
        # A large normaliser: normed tangents hide in the loss how long they were.
        sct = common.objective("sct", normaliser=100.0)
        changes |= {"objective": sct, "time": "angle", "model.level_scale": 1.0}
    changes |= {"task": "reconstruction"} if name == "reconstruction" else {}
    task = tiny_task(changes)
    params = random_params(task)
    images = np.random.default_rng(0).integers(100, 156, (4, 16, 16, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(4, jnp.int32), "row": jnp.arange(4)}
    run = jax.jit(lambda batch, step: task.loss(params, {}, batch, jax.random.key(3), step)[0])
    # A checkerboard at the images' own Nyquist rate is nothing on the grid.
    checks = (40 * (np.indices((16, 16)).sum(0) % 2) - 20)[None, :, :, None]
    flat = np.abs(np.asarray(on_grid(jnp.asarray(checks, jnp.float32), 8))).max()
    other = batch | {"image": jnp.asarray((images + checks).astype(np.uint8))}
    first, second = (float(run(each, jnp.asarray(7))) for each in (batch, other))
    assert flat < 4 and np.isfinite(first) and abs(first - second) > 1e-5 * abs(first)


def test_functions_are_made_for_the_grid(tiny_task):
    unset = {f"model.{name}": None for name in ("function_width", "function_depth", "bands", "groups")}
    local = tiny_task(LARGE | unset | {"model.function": "local64"}).model.kind
    assert tiny_task(LARGE).model.kind.cutoff == 4 and (local.rows, local.columns) == (2, 2)
    assert tiny_task(LARGE | {"model.network": "uvit", "model.heads": 2, "model.depth": 2}).model.image_size == (8, 8)


def test_samples_have_the_grids_noise_and_any_size(tiny_task, random_params):
    task = tiny_task(LARGE)
    functions = jax.jit(functools.partial(task.sample, steps=2))(random_params(task), jax.random.key(0), jnp.arange(2))
    assert functions.grid == (8, 8) and functions.native.noisy.shape == (2, 8, 8, 1)
    assert render(functions, 16, 16).shape == (2, 16, 16, 1)
    # Noise finer than the image, as the paper's Table 4, is the same the other way round.
    task = tiny_task(LARGE | {"data.image_size": 4, "window": 0})
    images = {"image": jnp.zeros((2, 4, 4, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32), "row": jnp.arange(2)}
    assert np.isfinite(jax.jit(task.loss)(random_params(task), {}, images, jax.random.key(0), jnp.asarray(3))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 0}, "found window 6 without a grid"),
        ({"grid": -8}, "found grid -8, expected 0 or more pixels a side"),
        ({"window": 17}, "found window 17 for images of 16"),
        ({"distance": "laplacian"}, "found distance 'laplacian' with a grid of its own"),
        ({"variational": True}, "expected config.variational=False"),
    ],
)
def test_windows_that_cannot_be(tiny_task, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(LARGE | changes)
