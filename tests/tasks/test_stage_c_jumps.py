"""Stage C as a consistency function: its path, what its loss moves, what it starts from, and pictures in one step."""

import functools
import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import wuerstchen
from fid_imagegen import tasks
from fid_imagegen.diffusion import cosine, targets
from fid_imagegen.pipelines import WuerstchenPipeline
from fid_imagegen.training import optimizer, runs, warm_start

KEY = jax.random.key(0)


@functools.cache
def config(**changes):
    made = wuerstchen.get_config("jumps,runlocal").stage_c_jumps.copy_and_resolve_references()
    made.unlock()
    made.update_from_flattened_dict(changes)
    return made


@functools.cache
def groups():
    """All groups of the task, every number drawn."""
    task = tasks.build(config())
    abstract = jax.eval_shape(lambda: task.init(KEY)[0]) | task.frozen()
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    made = jax.tree.unflatten(tree, drawn)
    return made | {"compressor_stats": jax.tree.map(lambda x: jnp.abs(x) + 0.1, made["compressor_stats"])}


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    tokens = np.array([[0, 5 + row, 9, 1, *[1] * 12] for row in range(4)], np.int32)
    mask = jnp.arange(16) < jnp.full((4, 1), 4)
    return {"image": jnp.asarray(images), "row": jnp.arange(4), "tokens": jnp.asarray(tokens), "mask": mask}


def loss(batch, **changes):
    task = tasks.build(config(**changes))
    run = lambda trained: task.loss(groups() | trained, {}, batch, KEY, jnp.int32(3))[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(run))({name: groups()[name] for name in task.trained})


def test_the_path_is_trigflows():
    t = jnp.linspace(0.02, 0.99, 50)
    angle = jnp.arccos(jnp.sqrt(cosine.alpha_bar(t)))
    np.testing.assert_allclose(cosine.time_of_angle(angle), t, atol=1e-4)
    # Minus the velocity is EDM's raw output: f = cos x_t - sin v at both.
    x, v, jump = jnp.ones((1, 2, 2, 1)), 0.7 * jnp.ones((1, 2, 2, 1)), targets.form("jump")
    found = jump.to_x0(v, x, t[20:21])
    np.testing.assert_allclose(found, np.cos(angle[20]) - np.sin(angle[20]) * 0.7, rtol=1e-5)


def test_a_step_goes_to_the_end_and_back():
    jump, (x, v, noise) = targets.form("jump"), jax.random.normal(KEY, (3, 5, 2, 2, 1))
    t = jnp.full(5, 0.7)
    x0 = jump.to_x0(v, x, t)
    np.testing.assert_array_equal(jump.step(x, v, t, jnp.zeros(5), noise), x0)
    back = jump.step(x, v, t, jnp.full(5, 0.4), noise)
    np.testing.assert_allclose(back, cosine.add_noise(x0, noise, jnp.full(5, 0.4)), rtol=1e-6)


def test_the_loss_moves_the_student_alone(batch):
    value, gradient = loss(batch)
    assert np.isfinite(value)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient["stage_c_jumps"])) > 0
    assert not any(x.any() for x in jax.tree.leaves(gradient["text"]))


def test_the_teacher_is_guided_and_the_target_may_be_an_average(batch):
    values = [loss(batch, teacher_guidance=scale)[0] for scale in (1.0, 4.0)]
    assert abs(values[0] - values[1]) > 1e-4 * abs(values[0])
    task = tasks.build(config(**{"objective.mu": 0.9}))
    assert task.tracked["target"][0] == "stage_c_jumps" and tasks.build(config()).tracked == {}


def test_a_student_starts_as_a_stage_c_of_form_v(random_stages, tmp_path):
    shutil.copytree(random_stages / "stage_c", tmp_path / "stage_c")
    _, params = runs.read_params(tmp_path / "stage_c")
    made = config().copy_and_resolve_references()
    task = tasks.build(made)
    init = {"teacher": "../stage_c", "stage_c_jumps": "../stage_c"}
    abstract = {name: jax.eval_shape(lambda: task.init(KEY)[0])["stage_c_jumps"] for name in init}
    filled = warm_start.fill(abstract, init, tmp_path / "stage_c_jumps", task.borrowed)
    for tree in filled.values():
        jax.tree.map(np.testing.assert_array_equal, tree, params["stage_c"])
    made.latent_scale = "published"
    with pytest.raises(ValueError, match="found a Stage C in ../stage_c of latent_scale .*, expected "):
        warm_start.fill(abstract, init, tmp_path / "stage_c_jumps", tasks.build(made).borrowed)
    with pytest.raises(ValueError, match="found a Stage C in ../stage_b of latent_scale"):
        shutil.copytree(random_stages / "stage_b", tmp_path / "stage_b")
        warm_start.fill(abstract, dict.fromkeys(init, "../stage_b"), tmp_path / "stage_c_jumps", task.borrowed)


@pytest.mark.parametrize("name", ["wuerstchen", "shapes_wuerstchen"])
def test_the_text_encoder_comes_from_the_teacher_and_stays(name):
    """A rate of zero, for the decay of AdamW would move what gets no gradient."""
    made = importlib.import_module(f"configs.{name}").get_config("jumps,runlocal").stage_c_jumps
    assert (made.init.text, made.optimizers.text.learning_rate) == ("../stage_c", 0)
    transform = optimizer.build(made.optimizers.text, made.num_steps)
    params = {"kernel": jnp.ones(3)}
    updates, _ = transform.update({"kernel": jnp.zeros(3)}, transform.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 0)
    with pytest.raises(ValueError, match="found a rate of 0.001 for the text encoder, expected 0"):
        tasks.build(config(**{"optimizers.text.learning_rate": 1e-3}))


def test_pictures_in_one_and_two_steps(random_stages, tmp_path):
    folder = shutil.copytree(random_stages, tmp_path / "model")
    theirs, params = runs.read_params(folder / "stage_c")
    theirs.unlock()
    theirs.update({"task": "stage_c_jumps", "form": "jump", "distance": "l2", "teacher_guidance": 2.0})
    theirs.objective, theirs.optimizers = config().objective, config().optimizers
    renamed = {"stage_c_jumps" if name == "stage_c" else name: tree for name, tree in params.items()}
    runs.write_params(folder / "stage_c_jumps", theirs, renamed)
    shutil.copyfile(folder / "stage_c" / "tokenizer.json", folder / "stage_c_jumps" / "tokenizer.json")
    pipe = WuerstchenPipeline.from_pretrained(folder, prior="stage_c_jumps")
    asked = {"prior_guidance_scale": 1.0, "num_inference_steps": 2, "progress": False}
    one, two = (pipe(["a red star"] * 2, prior_num_inference_steps=steps, **asked) for steps in (1, 2))
    assert one.shape == two.shape and one.dtype == np.uint8 and np.abs(one.astype(int) - two).max() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "v"}, "found form 'v' for task 'stage_c_jumps', expected 'jump'"),
        ({"distance": "laplacian"}, "found distance 'laplacian', expected one of"),
        ({"objective": {"name": "sct"}}, "found objective 'sct' for Stage C, .* multiplies the level by 10,000"),
        ({"objective": {"name": "edm"}}, "found objective 'edm' for Stage C"),
    ],
)
def test_what_cannot_be(changes, message):
    made = config().copy_and_resolve_references()
    for name, value in changes.items():
        if name == "objective":
            made.objective = type(made)(value)
        else:
            made[name] = value
    with pytest.raises(ValueError, match=message):
        tasks.build(made)
    with pytest.raises(ValueError, match="found 'jumps' without a Stage C of form 'v'"):
        wuerstchen.get_config("published,jumps")
