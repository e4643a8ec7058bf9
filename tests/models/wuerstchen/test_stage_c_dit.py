import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.rotary import rotary_angles
from fid_imagegen.models.wuerstchen.stage_c_dit import (
    EQUAL_TO_STAGE_C,
    StageCTransformer,
    TransformerBlock,
)

STAGE_C_PARAMETERS = 993_636_896
TINY = {"channels": 3, "width": 16, "text_width": 6, "depth": 2, "heads": 2, "dropout": 0.1}


def shapes(model, size=(2, 3)):
    args = jnp.zeros((1, *size, model.channels)), jnp.zeros(1), jnp.zeros((1, 4, model.text_width))
    return jax.eval_shape(lambda key: model.init(key, *args, method="end_to_end"), jax.random.key(0))["params"]


@pytest.fixture(scope="module")
def params():
    """Random weights everywhere: an untrained block is the identity and would hide errors."""
    generator = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.4 * generator.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes(StageCTransformer(**TINY)))


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(2, 3, 5, 3), jnp.asarray([0.2, 0.9]), draw(2, 4, 6)


def run(params, inputs, **changes):
    model = StageCTransformer(**TINY | changes)
    return jax.jit(lambda p, *args: model.apply({"params": p}, *args, method="end_to_end"))(params, *inputs)


def test_it_has_as_many_parameters_as_stage_c():
    counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(StageCTransformer(**EQUAL_TO_STAGE_C))))
    assert counted == 998_626_080 and abs(counted / STAGE_C_PARAMETERS - 1) < 0.01


def test_an_untrained_network_gives_zeros_in_float32(inputs):
    for dtype in (jnp.float32, jnp.bfloat16):
        model = StageCTransformer(**TINY, dtype=dtype)
        init = lambda key, m=model: m.init_with_output(key, *inputs, method="end_to_end")[0]  # noqa: E731
        for part in jax.jit(init)(jax.random.key(0)):
            assert part.shape == inputs[0].shape and part.dtype == jnp.float32 and not part.any()


def test_a_condition_made_once_serves_every_level(params, inputs):
    model, (x, _, text) = StageCTransformer(**TINY), inputs
    cond = model.apply({"params": params}, text, method="condition")
    assert [leaf.shape for leaf in jax.tree.leaves(cond)] == 2 * [
        (2, 2, 4, 2, 8)
    ]  # [L, batch, tokens, heads, features]
    for level in (0.1, 0.7):
        r_B = jnp.full((2,), level)
        a, b = model.apply({"params": params}, x, r_B, cond)
        expected = run(params, (x, r_B, text))
        np.testing.assert_allclose(a, expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(b, expected[1], rtol=1e-4, atol=1e-4)


def test_a_rematerialised_loop_equals_the_scan(params, inputs):
    def values_and_gradients(**changes):
        loss = lambda p: sum(jnp.sum(part**2) for part in run(p, inputs, **changes))  # noqa: E731
        return jax.value_and_grad(loss)(params)

    (value, gradients), (other, others) = values_and_gradients(), values_and_gradients(remat=True, unroll=True)
    assert other == pytest.approx(float(value), rel=1e-4)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_positions_levels_and_text_all_count(params, inputs):
    x, r_B, text = inputs
    a = run(params, inputs)[0]
    assert np.abs(run(params, (x, r_B + 0.05, text))[0] - a).max() > 1e-2
    assert np.abs(run(params, (x, r_B, text[::-1]))[0] - a).max() > 1e-2
    turned = run(params, (jnp.swapaxes(x, 1, 2), r_B, text))[0]
    assert np.abs(jnp.swapaxes(turned, 1, 2) - a).max() > 1e-2  # rows are not columns
    # Of a picture that is the same everywhere the outputs differ: rotations alone know distances, not places.
    flat = run(params, (jnp.ones_like(x), r_B, text))[0]
    assert np.abs(flat - flat[:, :1, :1]).max(axis=(0, 3))[1:, 1:].min() > 1e-2
    one = run(params, (x[1:], r_B[1:], text[1:]))[0]
    np.testing.assert_allclose(one, a[1:], rtol=1e-4, atol=1e-4)
    low = run(params, inputs, dtype=jnp.bfloat16)[0]
    assert low.dtype == jnp.float32 and 0 < np.abs(low - a).mean() < 0.1 * np.abs(a).mean()


@pytest.mark.parametrize("name", ["query", "key", "text_query", "text_key"])
def test_queries_and_keys_are_normed(params, inputs, name):
    """Where they are, a hundred times larger weights change nothing; values ten times larger do."""

    def scaled(layer, factor):
        blocks = params["blocks"] | {layer: jax.tree.map(lambda leaf: factor * leaf, params["blocks"][layer])}
        return run(params | {"blocks": blocks}, inputs)[0]

    a = run(params, inputs)[0]
    np.testing.assert_allclose(scaled(name, 100.0), a, rtol=1e-3, atol=1e-3)
    assert np.abs(scaled("value", 10.0) - a).max() > 1e-2


def test_a_block_is_its_definition(params):
    """Written out, with the rotations as products of complex numbers."""
    generator = np.random.default_rng(3)
    height, width = 2, 3
    x, text, level = (generator.standard_normal(shape) for shape in ((1, 6, 16), (1, 4, 16), (1, 16)))
    own = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["blocks"])
    dense = lambda name, x, p=own: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    heads = lambda x: np.stack(np.split(x, 2, axis=-1))  # noqa: E731
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)  # noqa: E731

    def rms(name, x):
        return own[name]["scale"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def rotated(x):
        row, column = np.divmod(np.arange(height * width), width)
        phases = np.stack([row, row / 100, column, column / 100], axis=1)  # 10,000^(-k / 2) for heads of 8
        turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * phases)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attend(q, k, v):
        weights = np.exp(np.einsum("hbqd,hbkd->hbqk", q, k) / np.sqrt(8))
        out = np.einsum("hbqk,hbkd->hbqd", weights / weights.sum(-1, keepdims=True), v)
        return np.concatenate(list(out), axis=-1)

    modulation = dense("modulation", level / (1 + np.exp(-level)))[:, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(modulation, 6, axis=-1)
    h = norm(x) * (1 + scale_a) + shift_a
    q, k = (rotated(rms(f"{name}_norm", heads(dense(name, h)))) for name in ("query", "key"))
    y = x + gate_a * dense("out", attend(q, k, heads(dense("value", h))))
    q, k = rms("text_query_norm", heads(dense("text_query", norm(y)))), heads(dense("text_key", text))
    y = y + dense("text_out", attend(q, rms("text_key_norm", k), heads(dense("text_value", text))))
    hidden = np.asarray(jax.nn.gelu(dense("up", norm(y) * (1 + scale_m) + shift_m, own["mlp"]), approximate=True))
    y = y + gate_m * dense("down", hidden, own["mlp"])

    block, variables = TransformerBlock(16, 2, 0.1), {"params": jax.tree.map(jnp.float32, own)}
    cond = block.apply(variables, None, jnp.float32(text), method="condition")[1]
    angles = rotary_angles(height, width, 8)
    ours, _ = block.apply(variables, jnp.float32(x), jnp.float32(level), angles, cond, True)
    np.testing.assert_allclose(ours, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_errors_say_what_to_change(inputs):
    def init(**changes):
        model = StageCTransformer(**TINY | changes)
        jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, method="end_to_end"))

    with pytest.raises(ValueError, match="found width 16 with 3 heads"):
        init(heads=3)
    with pytest.raises(ValueError, match="found heads of 2 features, expected a multiple of 4"):
        init(heads=8)
    with pytest.raises(ValueError, match="expected 4 channels last"):
        init(channels=4)
