import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.layers import AdaLNZeroBlock, Attention, DecoderBlock, LevelEmbedding, sin_cos_positions, stack


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)


def test_positions_encode_the_row_then_the_column():
    found = sin_cos_positions(2, 3, 8).reshape(2, 3, 8)
    for row, column in ((0, 0), (1, 2)):
        encode = lambda p: [np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)]  # noqa: E731  10000^(k/2)
        np.testing.assert_allclose(found[row, column], [*encode(row), *encode(column)], rtol=1e-6)
    with pytest.raises(ValueError, match="found 6 features, expected a multiple of 4"):
        sin_cos_positions(2, 2, 6)


def test_level_embedding_is_sin_cos_of_a_thousand_levels():
    level = jnp.asarray([-1.5537, 0.0, 1.0955])  # c_noise of sigma_min and of 80
    module = LevelEmbedding(16, scale=1000.0)
    params = module.init(jax.random.key(0), level[:, None])["params"]
    phases = 1000 * np.asarray(level)[:, None] * 10000 ** (-np.arange(128) / 128)
    x = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
    x = nn.silu(x @ params["Dense_0"]["kernel"]) @ params["Dense_1"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": params}, level[:, None]), x, atol=1e-4)


def test_both_ends_of_a_jump_are_embedded():
    levels, module = jnp.asarray([[0.3, 0.3], [0.3, 0.1], [0.1, 0.3]]), LevelEmbedding(16, scale=1.0)
    params = module.init(jax.random.key(0), levels)["params"]
    assert params["Dense_0"]["kernel"].shape == (512, 16)
    rows = module.apply({"params": params}, levels)
    assert all(np.abs(rows[i] - rows[j]).max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_attention(tokens):
    context = tokens[:, ::-1] * 2
    module = Attention(heads=2, use_bias=True)
    params = module.init(jax.random.key(0), tokens, context)["params"]
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases are zeros at first
    project = lambda name, x: (x @ params[name]["kernel"] + params[name]["bias"]).reshape(2, 5, 2, 4)  # noqa: E731
    out = jax.nn.dot_product_attention(project("query", tokens), project("key", context), project("value", context))
    expected = out.reshape(2, 5, 8) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, tokens, context), expected, atol=1e-5)
    with pytest.raises(ValueError, match="found width 8 with 3 heads"):
        Attention(heads=3, use_bias=True).init(jax.random.key(0), tokens, context)


def test_forward_mode_goes_through_attention(tokens):
    """Objectives that differentiate along the path need a JVP; flash kernels have none."""
    block = DecoderBlock(heads=2)
    params = block.init(jax.random.key(0), tokens, tokens)
    run = jax.jit(lambda x: block.apply(params, x, tokens)[0].sum())
    value, tangent = jax.jvp(run, (tokens,), (jnp.cos(tokens),))
    numeric = (run(tokens + 1e-2 * jnp.cos(tokens)) - run(tokens - 1e-2 * jnp.cos(tokens))) / 2e-2
    assert tangent == pytest.approx(float(numeric), rel=1e-2) and np.isfinite(value)


def test_an_untrained_adaln_zero_block_is_the_identity(tokens):
    block, condition = AdaLNZeroBlock(heads=2), jnp.ones((2, 8))
    params = block.init(jax.random.key(0), tokens, condition, True)
    np.testing.assert_array_equal(block.apply(params, tokens, condition, True)[0], tokens)
    opened = jax.tree.map(lambda x: x + 0.1, params)
    assert np.abs(block.apply(opened, tokens, condition, True)[0] - tokens).max() > 0.1


@pytest.mark.parametrize("block", [AdaLNZeroBlock, DecoderBlock])
def test_a_rematerialised_loop_equals_the_scan(tokens, block):
    """In values and gradients, on one tree of parameters."""
    context, static = ((jnp.ones((2, 8)), True), (3,)) if block is AdaLNZeroBlock else ((tokens[:, :3],), ())
    plain, other = (stack(block, 2, remat=r, unroll=r, static_argnums=static, heads=2) for r in (False, True))
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), tokens, *context))
    assert shapes == jax.eval_shape(lambda: other.init(jax.random.key(0), tokens, *context))
    generator = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape), jnp.float32), shapes)

    def run(model):
        loss = lambda p: (y := model.apply(p, tokens, *context)[0], jnp.sum(y**2))[::-1]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, values), gradients = run(plain)
    (_, other_values), other_gradients = run(other)
    np.testing.assert_allclose(other_values, values, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
