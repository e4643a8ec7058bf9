import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fid_imagegen.models.wuerstchen.stage_c import PUBLIC_STAGE_C, StageC

SMALL = {"c_in": 3, "c": 12, "c_cond": 5, "c_r": 8, "depth": 3, "nhead": 2, "dropout": 0.1}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


LATENTS, TEXT, LEVELS = normal(0, 2, 5, 4, 3), normal(1, 2, 6, 5), jnp.asarray([0.2, 0.9])


def init(model):
    return model.init(jax.random.key(0), LATENTS, LEVELS, TEXT, method="end_to_end")["params"]


@pytest.fixture(scope="module")
def params():
    """Every tensor at random, about as large as trained ones."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init(StageC(**SMALL))))
    return tree.unflatten([0.3 * normal((2, i), *leaf.shape) for i, leaf in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x=LATENTS, r=LEVELS, text=TEXT):
    return model.apply({"params": params}, x, r, text, method="end_to_end")


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(model, params):
    def loss(params):
        a, b = model.apply({"params": params}, LATENTS, LEVELS, TEXT, method="end_to_end")
        return jnp.mean(jnp.square(a) + jnp.square(b - 1))

    return jax.value_and_grad(loss)(params)


def close(found, expected, tolerance):
    """Within `tolerance` of the largest value of all: a key's bias, the same for every key, has a gradient of mere round-off."""
    found, expected = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_public_parameter_count():
    model = StageC(**PUBLIC_STAGE_C)
    args = (jnp.zeros((1, 1, 1, 16)), jnp.zeros(1), jnp.zeros((1, 1, 1280)))
    shapes = jax.eval_shape(lambda key: model.init(key, *args, method="end_to_end"), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 993_636_896
    assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes["params"]["blocks"])} == {32}


def test_initialisers_are_the_authors():
    params = jax.jit(lambda: init(StageC(**SMALL | {"c": 96, "nhead": 4, "depth": 8})))()
    blocks = params["blocks"]
    xavier = lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out))  # noqa: E731
    deviations = {
        "up": (blocks["residual"]["up"], xavier(96, 384)),
        "down": (blocks["residual"]["down"], xavier(384, 96) * np.sqrt(1 / 8)),
        "depthwise": (blocks["residual"]["depthwise"], xavier(9, 9 * 96)),
        "query": (blocks["attention"]["query"], xavier(96, 3 * 96)),
        "text_mapper": (blocks["attention"]["text_mapper"], xavier(96, 96)),
        "out": (blocks["attention"]["out"], xavier(96, 96)),
        "mapper": (blocks["timestep"]["mapper"], 0),
        "cond_in": (params["cond_in"], 0.02),
        "cond_out": (params["cond_out"], 0.02),
        "projection": (params["projection"], 0.02),
        "head": (params["out"], 0),
    }
    for name, (layer, expected) in deviations.items():
        assert np.std(layer["kernel"]) == pytest.approx(expected, rel=0.1), name
        assert not np.any(layer["bias"]), name
    assert not np.any(blocks["residual"]["response_norm"]["gamma"])
    up = np.asarray(blocks["residual"]["up"]["kernel"])
    assert np.abs(up[0] - up[1]).max() > 0.1  # each layer drew its own


def test_a_zero_head_knows_nothing(params):
    """As at initialisation; the published noise estimate is then x."""
    a, b = run(StageC(**SMALL), params | {"out": jax.tree.map(jnp.zeros_like, params["out"])})
    np.testing.assert_array_equal(a, jnp.zeros_like(LATENTS))
    np.testing.assert_array_equal(b, jnp.zeros_like(LATENTS))


@pytest.mark.parametrize("changes", [{"unroll": True}, {"remat": True}], ids=str)
def test_scan_and_remat_change_nothing(params, changes):
    value, gradient = value_and_gradient(StageC(**SMALL), params)
    close(value_and_gradient(StageC(**SMALL | changes), params), (value, gradient), 1e-5)
    unused = [path for path, leaf in flatten_dict(gradient).items() if np.abs(leaf).max() < 1e-5]
    assert all(path[-2:] == ("key", "bias") for path in unused)


def test_one_condition_serves_every_level(params):
    model = StageC(**SMALL)
    cond = model.apply({"params": params}, TEXT, method="condition")
    assert all(leaf.shape == (3, 2, 6, 2, 6) for leaf in cond)
    results = []
    for level in (0.1, 0.7):
        found = model.apply({"params": params}, LATENTS, jnp.full(2, level), cond)
        close(found, run(model, params, r=jnp.full(2, level)), 1e-5)
        results.append(found[0])
    assert np.abs(results[0] - results[1]).max() > 0.1
    assert np.abs(run(model, params, text=TEXT[::-1])[0] - run(model, params)[0]).max() > 0.01


def test_any_height_and_width(params):
    a, b = run(StageC(**SMALL), params, x=normal(3, 2, 3, 7, 3))
    assert a.shape == b.shape == (2, 3, 7, 3)


def test_bfloat16_is_near_float32(params):
    half = StageC(**SMALL, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(half)))} == {jnp.dtype("float32")}
    found, expected = run(half, params), run(StageC(**SMALL), params)
    assert all(leaf.dtype == jnp.float32 for leaf in found)
    close(found, expected, 0.05)
    assert np.abs(found[0] - expected[0]).max() > 1e-4  # it did compute in bfloat16
    # These two levels are one in bfloat16, and 20 radians apart.
    near, far = run(half, params, r=jnp.full(2, 0.800)), run(half, params, r=jnp.full(2, 0.802))
    assert jnp.bfloat16(0.800) == jnp.bfloat16(0.802) and np.abs(near[0] - far[0]).max() > 0.1


def test_dropout_is_for_training_alone(params):
    model = StageC(**SMALL)

    @functools.partial(jax.jit, static_argnums=1)
    def drop(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, LATENTS, LEVELS, TEXT, deterministic, method="end_to_end", rngs=rngs)[0]

    np.testing.assert_allclose(drop(0, True), run(model, params)[0], atol=1e-5)
    assert np.abs(drop(0, False) - drop(0, True)).max() > 0.01
    assert np.abs(drop(0, False) - drop(1, False)).max() > 0.01
    np.testing.assert_array_equal(drop(0, False), drop(0, False))


def test_inputs_of_another_model_are_refused(params):
    with pytest.raises(ValueError, match=r"found text of shape \(2, 6, 4\), expected 5 channels last"):
        run(StageC(**SMALL), params, text=TEXT[..., :4])
    with pytest.raises(ValueError, match=r"found latents of shape \(2, 5, 4, 2\), expected 3 channels last"):
        run(StageC(**SMALL), params, x=LATENTS[..., :2])
