"""Stages B and C as consistency functions: their path, what a loss moves, what a student is told and starts from, pictures."""

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
from fid_imagegen.diffusion.preconditioning import consistency_function, per_image
from fid_imagegen.pipelines import WuerstchenPipeline
from fid_imagegen.tasks.jumps import NOISE
from fid_imagegen.training import optimizer, runs, warm_start

KEY = jax.random.key(0)
BATCH = 4


@functools.cache
def config(stage="stage_c", variant="", **changes):
    made = wuerstchen.get_config(f"jumps,b_jumps,{variant},runlocal")[f"{stage}_jumps"].copy_and_resolve_references()
    made.unlock()
    made.update_from_flattened_dict(changes)
    return made


@functools.cache
def groups(stage="stage_c"):
    """All groups of the task, every number drawn."""
    task = tasks.build(config(stage))
    params, stats = jax.eval_shape(lambda: task.init(KEY))
    leaves, tree = jax.tree.flatten(params | stats | task.frozen())
    rng = np.random.default_rng(7)  # jax would compile a program for each shape
    made = jax.tree.unflatten(tree, [0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves])
    positive = {name: jax.tree.map(lambda x: np.abs(x) + 0.1, made[name]) for name in made if name.endswith("_stats")}
    return jax.tree.map(jnp.asarray, made | positive)


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 64, 64, 3), dtype=np.uint8)
    tokens = np.array([[0, 5 + row, 9, 1, *[1] * 12] for row in range(BATCH)], np.int32)
    mask = jnp.arange(16) < jnp.full((BATCH, 1), 4)
    return {"image": jnp.asarray(images), "row": jnp.arange(BATCH), "tokens": jnp.asarray(tokens), "mask": mask}


def seen(task, every, batch):
    """(nets, x0, cond) that the task hands its objective."""
    handed = {}

    def objective(nets, x0, cond, **_):
        handed.update(nets=nets, x0=x0, cond=cond)
        return jnp.zeros(len(x0)), {}

    objective.nets = task.objective.nets
    task.objective = objective
    task.loss(every, {}, batch, KEY, jnp.int32(3))
    return handed["nets"], handed["x0"], handed["cond"]


def test_the_path_is_trigflows():
    t = jnp.linspace(0.02, 0.99, 50)
    angle = jnp.arccos(jnp.sqrt(cosine.alpha_bar(t)))
    np.testing.assert_allclose(cosine.time_of_angle(angle), t, atol=1e-4)
    ends = jnp.sqrt(1 / cosine.alpha_bar(jnp.asarray([0.0, 1.0])) - 1)
    np.testing.assert_allclose(ends, (NOISE.sigma_min, NOISE.sigma_max), rtol=1e-3)
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


@pytest.mark.parametrize(
    ("stage", "variant"),
    [("stage_c", ""), ("stage_c", "continuous"), pytest.param("stage_b", "", marks=pytest.mark.slow)],
)
def test_the_loss_moves_the_student_and_what_tells_it_the_scale(stage, variant, batch):
    """And neither a text encoder nor a compressor; their statistics stay."""
    task, every = tasks.build(config(stage, variant)), groups(stage)
    stats = {name: tree for name, tree in every.items() if name == "compressor_stats" and stage == "stage_b"}
    run = lambda trained: task.loss(every | trained, stats, batch, KEY, jnp.int32(3))  # noqa: E731
    trained = {name: every[name] for name in task.trained}
    (value, (after, _)), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(trained)
    assert np.isfinite(value)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    largest = {name: max(np.abs(x).max() for x in jax.tree.leaves(tree)) for name, tree in gradient.items()}
    assert all(np.isfinite(list(largest.values())))
    assert {name for name in largest if largest[name] > 0} == {task.group, "guidance"}


def test_a_weight_of_levels_is_the_objectives_own(batch):
    task, every = tasks.build(config(variant="continuous,weighted")), groups()
    assert task.trained == (*tasks.build(config(variant="continuous")).trained, "level_weight")
    fresh = jax.eval_shape(task.init, KEY)[0]["level_weight"]
    own = {"level_weight": jax.tree.map(lambda x: jnp.ones(x.shape), fresh)}
    run = lambda own: task.loss(every | own, {}, batch, KEY, jnp.int32(3))[0]  # noqa: E731
    assert jax.eval_shape(jax.grad(run), own)["level_weight"]["cosines"].shape == (16,)
    nets, *_ = seen(task, every | own, batch)
    np.testing.assert_allclose(nets["level_weight"](jnp.zeros(2)), 16)


@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_the_student_is_told_the_scale_that_guides_the_teacher(stage, batch):
    task, every = tasks.build(config(stage, **{"disturbance.noised": 0.0} if stage == "stage_b" else {})), groups(stage)
    nets, x0, cond = seen(task, every, batch)
    low, high = task.told_guidance
    assert (low <= cond["scale"]).all() and (cond["scale"] <= high).all() and len(set(cond["scale"].tolist())) == BATCH
    x, levels, model = 0.7 * x0, jnp.full((BATCH, 1), 0.8), task.denoiser.model
    t_B = cosine.time_of_angle(levels[:, 0])
    velocity = lambda name, given: model.apply({"params": every[name]}, x, t_B, *given, method=model.end_to_end)[0]  # noqa: E731
    place = 0  # of what the scale is added to
    told = task.embedding.apply({"params": every["guidance"]}, cond["scale"])
    first = cond["follow"][place]
    given = (first + told.reshape(BATCH, *[1] * (first.ndim - 2), -1), *cond["follow"][1:])

    @jax.jit
    def compared():
        follow, nothing = (velocity("teacher", cond[name]) for name in ("follow", "nothing"))
        guided = nothing + cond["scale"][:, None, None, None] * (follow - nothing)
        made = {name: nets[name](x, levels, cond, key=None) for name in ("student", "teacher")}
        return made, {"student": -velocity(task.group, given), "teacher": -guided}

    made, expected = compared()
    np.testing.assert_allclose(made["student"], expected["student"], rtol=1e-5)
    np.testing.assert_allclose(made["teacher"], expected["teacher"], rtol=1e-4, atol=1e-5)
    if stage == "stage_b":
        assert not cond["nothing"][0].any() and cond["follow"][1] is None
        images = batch["image"].astype(jnp.float32) / 255
        np.testing.assert_allclose(first, task.compress(every, images), rtol=1e-5)
        np.testing.assert_allclose(x0, task.first_stage.encode(every, images), rtol=1e-5)
    else:
        empty = task.text.features(every, batch, jnp.ones(BATCH, bool))
        np.testing.assert_array_equal(cond["nothing"][0], empty)


def test_what_is_trained_is_the_jump_that_is_sampled(batch):
    """f of minus the velocity at its angle is the step of form `jump`."""
    task, every = tasks.build(config(variant="continuous")), groups()
    made, jump, model = task.objective, targets.form("jump"), task.denoiser.model  # `seen` puts another in its place
    nets, x, cond = seen(task, every, batch)
    t = jnp.asarray([0.05, 0.3, 0.6, 0.9])
    angle = per_image(jnp.arccos(jnp.sqrt(cosine.alpha_bar(t))))
    f = functools.partial(consistency_function, nets["student"], key=None, noise=made.noise, form=made.form)
    found = jax.jit(f)(x / jnp.cos(angle), jnp.tan(angle)[:, 0, 0, 0], cond)
    output = model.apply({"params": every[task.group]}, x, t, *cond["told"], method=model.end_to_end)
    np.testing.assert_allclose(found, jump.to_x0(jump.predict(output, x, t), x, t), rtol=1e-3, atol=1e-4)


def test_the_target_may_be_an_average():
    task = tasks.build(config(**{"objective.mu": 0.9}))
    assert task.tracked["target"][0] == "stage_c_jumps" and tasks.build(config()).tracked == {}


def test_a_fresh_student_is_its_teacher_whatever_the_scale(batch):
    """The embedding of the scale ends in zeros, and one pass is made where guidance mixes two."""
    task, every = tasks.build(config()), groups()
    fresh = every | {"guidance": jax.jit(lambda: task.init(KEY)[0]["guidance"])()}
    condition = jax.jit(lambda every, scale: task.condition(every, batch["tokens"], batch["mask"], None, scale))
    given, mixed = task.denoiser.guidance(2.0)
    assert mixed is None

    @jax.jit
    def told_and_plain(every):
        text = task.text.encode(every, batch["tokens"], batch["mask"])
        return condition(every, given), task.denoiser.condition(every[task.group], text)

    told, plain = told_and_plain(fresh)
    jax.tree.map(np.testing.assert_array_equal, told, plain)
    one, two = (condition(every, task.denoiser.guidance(scale)[0])[0] for scale in (1.0, 2.0))
    assert one.shape == plain[0].shape and float(jnp.abs(one - two).max()) > 1e-3
    with pytest.raises(ValueError, match="found guidance 9 for a model that is told its guidance, expected 1 to 8"):
        task.denoiser.guidance(9.0)


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
    with pytest.raises(ValueError, match="found a run in ../stage_c of latent_scale .*, expected "):
        warm_start.fill(abstract, init, tmp_path / "stage_c_jumps", tasks.build(made).borrowed)
    with pytest.raises(ValueError, match="found a run in ../stage_c of model.nhead 2, expected 4"):
        other = tasks.build(config(**{"model.nhead": 4}))
        warm_start.fill(abstract, init, tmp_path / "stage_c_jumps", other.borrowed)
    smooth = tasks.build(config(variant="continuous"))
    with pytest.raises(ValueError, match="found a run in ../stage_c of model.level_scale 10000.0, expected 16.0"):
        warm_start.fill(abstract, init, tmp_path / "stage_c_jumps", smooth.borrowed)
    with pytest.raises(ValueError, match="found a run in ../stage_b of latent_scale"):
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
    with pytest.raises(ValueError, match="found a rate of 0.001 for 'text', expected 0"):
        tasks.build(config(**{"optimizers.text.learning_rate": 1e-3}))


def test_the_twins_draw_in_one_and_two_steps(random_stages, tmp_path):
    folder = shutil.copytree(random_stages, tmp_path / "model")
    for stage in ("stage_b", "stage_c"):
        twin, theirs, params = f"{stage}_jumps", *runs.read_params(folder / stage)
        made = config(stage).copy_and_resolve_references()
        made.update({name: theirs[name] for name in ("model", "latent_scale", "compressor", "text")})
        embedding = tasks.build(made).init(KEY)[0]["guidance"]
        params = {twin if name == stage else name: tree for name, tree in params.items()} | {"guidance": embedding}
        runs.write_params(folder / twin, made, params)
    shutil.copyfile(folder / "stage_c" / "tokenizer.json", folder / "stage_c_jumps" / "tokenizer.json")
    pipe = WuerstchenPipeline.from_pretrained(folder, "stage_c_jumps", "stage_b_jumps")
    draw = lambda c, b, **asked: pipe(  # noqa: E731
        ["a red star"] * 2, prior_num_inference_steps=c, num_inference_steps=b, progress=False, **asked
    )
    one, two, decoded = draw(1, 1), draw(2, 1), draw(1, 2)
    assert one.shape == two.shape == (2, 64, 64, 3) and one.dtype == np.uint8
    assert all(np.abs(one.astype(int) - other).max() > 1 for other in (two, decoded))
    with pytest.raises(ValueError, match="found a negative prompt for stage_c_jumps, which is told its guidance"):
        draw(1, 1, negative_prompt="blue")
    with pytest.raises(ValueError, match="found guidance 0 for a model that is told its guidance, expected 1 to"):
        draw(1, 1, prior_guidance_scale=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "v"}, "found form 'v' for task 'stage_c_jumps', expected 'jump'"),
        ({"distance": "laplacian"}, "found distance 'laplacian', expected one of"),
        (
            {"objective": {"name": "sct", "distilled": True}},
            "found a level embedding of 10000 radians .* for objective 'sct'",
        ),
        (
            {"objective": {"name": "edm"}},
            "found objective 'edm' for task 'stage_c_jumps', expected one of the consistency",
        ),
        ({"objective": {"name": "meanflow"}}, "found objective 'meanflow' with a network of another form"),
        ({"objective": {"name": "ect"}}, "found teacher_guidance .* for objective 'ect', which has no teacher"),
        ({"teacher_guidance": (2.0, 1.0)}, "found teacher_guidance 2.0 to 1.0, expected a range"),
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
    with pytest.raises(ValueError, match="found a variant of a twin without one, expected jumps or b_jumps"):
        wuerstchen.get_config("tuned")
