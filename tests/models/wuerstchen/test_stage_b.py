import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fid_imagegen.models.wuerstchen.stage_b import PUBLIC_STAGE_B, StageB, Upsample

SMALL = {
    "c_in": 3,
    "c_r": 8,
    "patch_size": 2,
    "c_cond": 10,
    "c_hidden": (6, 8),
    "nhead": (-1, 2),
    "blocks": (1, 2),
    "level_config": ("CT", "CTA"),
    "inject_effnet": (False, True),
    "effnet_embd": 4,
    "clip_embd": 5,
    "kernel_size": 3,
    "dropout": 0.1,
    "text": True,
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


LATENTS, EFFNET, TEXT, LEVELS = (
    normal(0, 2, 8, 12, 3),
    normal(1, 2, 3, 2, 4),
    normal(2, 2, 6, 5),
    jnp.asarray([0.2, 0.9]),
)


def init(model, effnet=EFFNET, text=TEXT):
    return model.init(jax.random.key(0), LATENTS, LEVELS, effnet, text, method="end_to_end")["params"]


def random_params(model, effnet=EFFNET, text=TEXT):
    """Every tensor at random, about as large as trained ones."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init(model, effnet, text)))
    return tree.unflatten([0.3 * normal((3, i), *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def params():
    return random_params(StageB(**SMALL))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x=LATENTS, r=LEVELS, effnet=EFFNET, text=TEXT):
    return model.apply({"params": params}, x, r, effnet, text, method="end_to_end")


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(model, params):
    def loss(params):
        a, b = model.apply({"params": params}, LATENTS, LEVELS, EFFNET, TEXT, method="end_to_end")
        return jnp.mean(jnp.square(a) + jnp.square(b - 1))

    return jax.value_and_grad(loss)(params)


def close(found, expected, tolerance):
    """Within `tolerance` of the largest value of all: a key's bias, the same for every key, has a gradient of mere round-off."""
    found, expected = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_public_parameter_count():
    model = StageB(**PUBLIC_STAGE_B)
    args = (jnp.zeros((1, 16, 16, 4)), jnp.zeros(1), jnp.zeros((1, 1, 1, 16)), jnp.zeros((1, 1, 1024)))
    shapes = jax.eval_shape(lambda key: model.init(key, *args, method="end_to_end"), jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_055_365_280
    # The skip connections' widths, by hand: 320 + 320, 640 + 640 + 1024 and 1280 + 1280 + 1024.
    widths = [shapes[f"up_{i}"]["first"]["residual"]["up"]["kernel"].shape[0] for i in (3, 2, 1)]
    assert widths == [640, 2304, 3584] and "first" not in shapes["up_0"]


def test_a_zero_head_is_sure_of_nothing(params):
    """As at initialisation; the published noise estimate is then 2 x."""
    a, b = run(StageB(**SMALL), params | {"clf": jax.tree.map(jnp.zeros_like, params["clf"])})
    np.testing.assert_array_equal(a, jnp.zeros_like(LATENTS))
    np.testing.assert_allclose(b, 0.5, atol=1e-6)


def test_initialisers_are_the_authors():
    model = StageB(**SMALL | {"c_hidden": (64, 128), "nhead": (-1, 4), "blocks": (3, 2)})
    params = jax.jit(lambda: init(model))()
    xavier = lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out))  # noqa: E731
    deviations = {
        "embedding": (params["embedding"], 0.02 * xavier(12, 64)),
        "up": (params["down_0"]["blocks"]["residual"]["up"], xavier(64, 256)),
        "down": (params["down_0"]["blocks"]["residual"]["down"], xavier(256, 64) * np.sqrt(1 / 5)),
        "first": (params["up_1"]["first"]["residual"]["up"], xavier(128, 256)),
        "downsample": (params["downsample_0"], xavier(4 * 64, 4 * 128)),
        "upsample": (params["upsample_0"], 1 / np.sqrt(3 * 4 * 64)),
        "effnet": (params["down_1"]["effnet_mapper"], 0.02),
        "clip": (params["clip_mapper"], 0.02),
        "head": (params["clf"], 0),
    }
    for name, (layer, expected) in deviations.items():
        assert np.std(layer["kernel"]) == pytest.approx(expected, rel=0.2), name
        assert not np.any(layer["bias"]), name


@pytest.mark.parametrize("changes", [pytest.param({"unroll": True}, marks=pytest.mark.slow), {"remat": True}], ids=str)
def test_scan_and_remat_change_nothing(params, changes):
    value, gradient = value_and_gradient(StageB(**SMALL), params)
    close(value_and_gradient(StageB(**SMALL | changes), params), (value, gradient), 1e-5)
    unused = [path for path, leaf in flatten_dict(gradient).items() if np.abs(leaf).max() < 1e-5]
    assert all(path[-2:] == ("key", "bias") for path in unused)


def test_one_condition_serves_every_level(params):
    model = StageB(**SMALL)
    cond = jax.jit(lambda: model.apply({"params": params}, EFFNET, TEXT, (8, 12), method="condition"))()
    assert cond["down"][0] == {"effnet": None, "first": None, "blocks": None}
    assert cond["down"][1]["effnet"].shape == cond["up"][0]["effnet"].shape == (2, 2, 3, 10)
    denoise = jax.jit(lambda r: model.apply({"params": params}, LATENTS, r, cond))
    results = []
    for level in (0.1, 0.7):
        found = denoise(jnp.full(2, level))
        close(found, run(model, params, r=jnp.full(2, level)), 1e-5)
        results.append(found[0])
    assert np.abs(results[0] - results[1]).max() > 0.01
    for changed in ({"text": TEXT[::-1]}, {"effnet": EFFNET[::-1]}):
        assert np.abs(run(model, params, **changed)[0] - run(model, params)[0]).max() > 0.01


def test_b_stays_inside_its_bounds(params):
    params = params | {"clf": jax.tree.map(lambda leaf: 100 * leaf, params["clf"])}
    _, b = run(StageB(**SMALL), params)
    assert b.min() == pytest.approx(0.001, rel=1e-3) and b.max() == pytest.approx(0.999)


def test_bfloat16_is_near_float32(params):
    half = StageB(**SMALL, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(half)))} == {jnp.dtype("float32")}
    found, expected = run(half, params), run(StageB(**SMALL), params)
    assert all(leaf.dtype == jnp.float32 for leaf in found)
    close(found, expected, 0.05)
    assert np.abs(found[0] - expected[0]).max() > 1e-4  # it did compute in bfloat16


def test_dropout_is_for_training_alone(params):
    model = StageB(**SMALL)

    @functools.partial(jax.jit, static_argnums=1)
    def drop(seed, deterministic):
        args = (LATENTS, LEVELS, EFFNET, TEXT, deterministic)
        return model.apply({"params": params}, *args, method="end_to_end", rngs={"dropout": jax.random.key(seed)})[0]

    np.testing.assert_allclose(drop(0, True), run(model, params)[0], atol=1e-5)
    assert np.abs(drop(0, False) - drop(0, True)).max() > 0.01
    assert np.abs(drop(0, False) - drop(1, False)).max() > 0.01


def test_without_text_the_image_attends_to_itself(params):
    """As with a text of no tokens."""
    flat = flatten_dict(params)
    own = unflatten_dict({path: leaf for path, leaf in flat.items() if not {"clip_mapper", "text_mapper"} & set(path)})
    without = StageB(**SMALL | {"text": False})
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(lambda: init(without, text=None)))
    assert shapes == jax.tree.map(jnp.shape, own) and len(flatten_dict(own)) < len(flat)
    expected = run(StageB(**SMALL), params, text=TEXT[:, :0])
    close(run(without, own, text=None), expected, 1e-5)
    assert np.abs(expected[0] - run(StageB(**SMALL), params)[0]).max() > 0.01


def test_without_compressor_latents_text_alone_conditions():
    model = StageB(**SMALL | {"inject_effnet": (False, False)})
    params = random_params(model, effnet=None)
    assert not any("effnet_mapper" in path for path in flatten_dict(params))
    changed = run(model, params, effnet=None, text=TEXT[::-1])[0] - run(model, params, effnet=None)[0]
    assert np.abs(changed).max() > 0.01
    with pytest.raises(ValueError, match="found compressor latents, expected none for this Stage B"):
        run(model, params)


def test_upsampling_is_the_transposed_convolution():
    x, kernel = normal(0, 2, 3, 4, 5), normal(1, 2, 2, 5, 6)
    found = Upsample(6).apply({"params": {"kernel": kernel, "bias": jnp.full(6, 0.5)}}, x)
    np.testing.assert_allclose(
        found, jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", transpose_kernel=False) + 0.5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": normal(0, 2, 8, 10, 3)}, "found latents of 8x10, expected multiples of 4"),
        ({"x": LATENTS[..., :2]}, r"found latents of shape .*, expected 3 channels last"),
        ({"effnet": EFFNET[..., :2]}, r"found compressor latents of shape \(2, 3, 2, 2\), expected 4 channels"),
        ({"text": TEXT[..., :2]}, r"found text of shape \(2, 6, 2\), expected 5 channels last"),
        ({"text": None}, "found no text, expected some for this Stage B"),
    ],
)
def test_inputs_of_another_model_are_refused(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(StageB(**SMALL), params, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 2, 3)}, "expected one entry a level in each"),
        ({"blocks": (1, 0)}, "at least one block a level"),
        ({"level_config": ("CT", "CFA")}, r"found level_config \['CFA'\], expected 'CT' or 'CTA'"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        init(StageB(**SMALL | changes))
