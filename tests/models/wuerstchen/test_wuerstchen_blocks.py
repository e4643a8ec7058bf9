import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.wuerstchen.blocks import (
    AttentionBlock,
    Block,
    ConvBlock,
    GlobalResponseNorm,
    TimestepBlock,
    layer_norm,
    level_embedding,
    stack_blocks,
)
from fid_imagegen.models.wuerstchen.resize import bicubic_matrix, resize


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(params, seed=0):
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([0.5 * normal((seed, i), *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize("size", [1, 5, 24])
def test_resizing_to_the_same_size_is_the_identity(size):
    np.testing.assert_allclose(bicubic_matrix(size, size), np.eye(size), atol=1e-15)


@pytest.mark.parametrize(("size", "new_size"), [(12, 16), (24, 16), (3, 40), (7, 1), (1, 7)])
def test_resizing_keeps_constants(size, new_size):
    np.testing.assert_allclose(bicubic_matrix(size, new_size).sum(axis=1), 1, atol=1e-12)


def test_resized_values_are_torchs():
    """torch.nn.functional.interpolate([1, 0, 0, 2, 0], mode="bicubic", antialias=True, align_corners=True), in float64."""
    enlarged = [1.07932692, 0.69794672, 0.0452645, -0.1875, 0.09074344, 1.49890671, 1.76803293, 0.34558195]
    shrunk = [0.38912134, 0.78597786, 0.453125]
    for expected in (enlarged, shrunk):
        found = bicubic_matrix(5, len(expected)) @ [1, 0, 0, 2, 0]
        np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [((5, 7), (12, 3)), ((24, 24), (64, 64)), ((36, 12), (16, 16)), ((3, 1), (1, 5))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resize_matches_torch(sizes, dtype):
    torch = pytest.importorskip("torch")
    (height, width), target = sizes
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(dtype)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=target, mode="bicubic", antialias=True, align_corners=True
    )
    with jax.enable_x64(dtype == np.float64):
        found = np.asarray(resize(jnp.asarray(x), *target))
    error = np.abs(found - expected.permute(0, 2, 3, 1).numpy()).max()
    print(f"{sizes} {np.dtype(dtype).name}: {error:.1e}")
    assert error < (1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("width", [4, 9, 64])
def test_level_embedding_is_sin_cos_of_ten_thousand_levels(width):
    r = np.asarray([0.0, 0.3, 0.99984, 1.0], np.float32)
    half = width // 2
    phases = 1e4 * r.astype(np.float64)[:, None] * 10.0 ** (-4 * np.arange(half) / (half - 1))
    found = np.asarray(jax.jit(level_embedding, static_argnums=1)(r, width))
    expected = np.concatenate([np.sin(phases), np.cos(phases), np.zeros((4, width % 2))], axis=1)
    np.testing.assert_allclose(found, expected, atol=3e-3)  # a phase of 1e4 has units of 1e-3 in float32
    with pytest.raises(ValueError, match="found a level embedding 3 wide, expected at least 4"):
        level_embedding(r, 3)


@pytest.mark.parity
@pytest.mark.parametrize("width", [5, 8, 32, 64, 128])
def test_level_embedding_matches_diffusers(width):
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    r = np.random.default_rng(0).uniform(0, 1, 64).astype(np.float32)
    twin = WuerstchenPrior(c_in=1, c=2, c_cond=2, c_r=width, depth=1, nhead=1)
    expected = twin.gen_r_embedding(torch.tensor(r)).numpy()
    error = np.abs(np.asarray(jax.jit(level_embedding, static_argnums=1)(r, width)) - expected).max()
    print(f"level embedding {width} wide: {error:.1e}")
    assert error < 1e-6


def test_layer_norm_works_in_float32():
    x = 100 + normal(0, 4, 64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x), expected, atol=1e-4)
    found = layer_norm(x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, layer_norm(x.astype(jnp.bfloat16).astype(jnp.float32)), atol=2e-2)


def test_response_norm():
    x = normal(0, 2, 3, 5, 4)
    params = {"gamma": normal(1, 4), "beta": normal(2, 4)}
    norms = np.linalg.norm(np.asarray(x, np.float64), axis=(1, 2), keepdims=True)
    expected = params["gamma"] * (x * (norms / (norms.mean(-1, keepdims=True) + 1e-6))) + params["beta"] + x
    np.testing.assert_allclose(GlobalResponseNorm().apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_response_norm_of_a_silent_channel_has_a_gradient():
    x = normal(0, 1, 2, 2, 3).at[..., 1].set(0.0)
    params = {"gamma": jnp.ones(3), "beta": jnp.zeros(3)}
    gradient = jax.grad(lambda x: GlobalResponseNorm().apply({"params": params}, x).sum())(x)
    assert np.isfinite(gradient).all()


def test_conv_block_joins_the_skip_after_the_norm():
    """The skip's weights act on the skip as it is: linear in it before the GELU."""
    block = ConvBlock(kernel=3, dropout=0.0, gain=1.0)
    x, skip = normal(0, 1, 3, 4, 6), normal(1, 1, 3, 4, 2)
    params = randomised(block.init(jax.random.key(0), x, skip, True)["params"])
    found = block.apply({"params": params}, x, skip, True)
    # A skip s and a bias are the same as a skip 0 and the bias plus s's product, when s is constant.
    constant = jnp.broadcast_to(skip[:, :1, :1], skip.shape)
    shifted = jax.tree.map(lambda leaf: leaf, params)
    shifted["up"]["bias"] = params["up"]["bias"] + skip[0, 0, 0] @ params["up"]["kernel"][6:]
    np.testing.assert_allclose(
        block.apply({"params": params}, x, constant, True),
        block.apply({"params": shifted}, x, jnp.zeros_like(skip), True),
        atol=1e-5,
    )
    assert params["up"]["kernel"].shape == (8, 24)
    assert np.abs(found - block.apply({"params": params}, x, constant, True)).max() > 0.1


def test_an_untrained_timestep_block_is_the_identity():
    x, embedding = normal(0, 2, 3, 4, 6), normal(1, 2, 8)
    block = TimestepBlock()
    params = block.init(jax.random.key(0), x, embedding)
    np.testing.assert_array_equal(block.apply(params, x, embedding), x)
    params = randomised(params)
    scale, shift = np.split(
        embedding @ params["params"]["mapper"]["kernel"] + params["params"]["mapper"]["bias"], 2, axis=1
    )
    expected = x * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(block.apply(params, x, embedding), expected, rtol=1e-5, atol=1e-5)


def attention_reference(params, x, text, heads):
    """Self and cross attention in one softmax, in float64 with numpy."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    x = np.asarray(x, np.float64).reshape(x.shape[0], -1, x.shape[-1])
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    context = normed
    if text is not None:
        text = np.asarray(text, np.float64)
        context = np.concatenate([normed, dense("text_mapper", text / (1 + np.exp(-text)))], axis=1)
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q, k, v = split(dense("query", normed)), split(dense("key", context)), split(dense("value", context))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return x + dense("out", np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


@pytest.mark.parametrize("with_text", [True, False])
def test_attention_is_over_image_and_text_in_one_softmax(with_text):
    block = AttentionBlock(features=6, heads=2, text=with_text, dropout=0.0)
    x, text = normal(0, 2, 2, 3, 6), normal(1, 2, 4, 5) if with_text else None

    def run(block, x, text):
        return block(x, None if text is None else block.keys_values(text), True)

    params = randomised(block.init(jax.random.key(0), x, text, method=run)["params"])
    assert ("text_mapper" in params) == with_text
    found = block.apply({"params": params}, x, text, method=run)
    np.testing.assert_allclose(found.reshape(2, 6, 6), attention_reference(params, x, text, 2), atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="found width 6 with 4 heads"):
        AttentionBlock(features=6, heads=4, text=False, dropout=0.0).init(
            jax.random.key(0), normal(0, 1, 2, 2, 6), None, True
        )


FIELDS = {"features": 6, "heads": 2, "text": True, "kernel": 3, "dropout": 0.0, "gain": 1.0}


def test_stacked_blocks_are_the_blocks_one_after_another():
    x, embedding, skip, text = normal(0, 2, 3, 4, 6), normal(1, 2, 8), normal(2, 2, 3, 4, 3), normal(3, 2, 4, 5)
    stacked, block = stack_blocks(3, remat=True, unroll=False, **FIELDS), Block(**FIELDS)

    def run(block, x):
        return block(x, embedding, skip, block.condition(None, text)[1], True)[0]

    params = randomised(stacked.init(jax.random.key(0), x, method=run)["params"])
    expected = x
    for layer in range(3):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params)
        expected = block.apply({"params": one}, expected, method=run)
    np.testing.assert_allclose(stacked.apply({"params": params}, x, method=run), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parity
def test_attention_matches_the_authors_class():
    """Their blocks hold torch.nn.MultiheadAttention: query, key and value are one matrix, in this order."""
    torch = pytest.importorskip("torch")
    from fid_imagegen.interop.wuerstchen import join_projections

    block = AttentionBlock(features=6, heads=2, text=False, dropout=0.0)
    x = normal(0, 2, 2, 3, 6)
    params = randomised(block.init(jax.random.key(0), x, None, True)["params"])
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    tensors = {f"attention.{names[k]}.weight": np.asarray(v["kernel"]).T for k, v in params.items()}
    tensors |= {f"attention.{names[k]}.bias": np.asarray(v["bias"]) for k, v in params.items()}
    twin = torch.nn.MultiheadAttention(6, 2, batch_first=True)
    twin.load_state_dict(
        {
            k.removeprefix("attention.attn."): torch.tensor(np.ascontiguousarray(v))
            for k, v in join_projections(tensors).items()
        }
    )
    tokens = torch.tensor(np.asarray(layer_norm(x)).reshape(2, 6, 6))
    expected = np.asarray(x).reshape(2, 6, 6) + twin(tokens, tokens, tokens)[0].detach().numpy()
    np.testing.assert_allclose(block.apply({"params": params}, x, None, True).reshape(2, 6, 6), expected, atol=1e-5)
