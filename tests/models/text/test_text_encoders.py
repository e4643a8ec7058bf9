import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.text.clip import ACTIVATIONS, BIG_G, CLIPTextEncoder, H, TextBlock
from fid_imagegen.models.text.small import SmallTextEncoder

ODD = {"width": 12, "layers": 3, "heads": 3, "hidden": 20, "vocabulary": 50, "length": 9, "end": 49}


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 49, (2, 7)), jnp.int32).at[:, 4:].set(49)


@pytest.fixture(scope="module", params=["clip", "small"])
def encoder(request, tokens):
    """(name, apply(tokens, mask) with random weights, biases and norms included)."""
    modules = {
        "clip": CLIPTextEncoder(**ODD, activation="quick_gelu", projection=5),
        "small": SmallTextEncoder(vocabulary=50, length=9, width=12, layers=2, heads=3),
    }
    module = modules[request.param]
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)
    return request.param, jax.jit(lambda tokens, mask=None: module.apply(variables, tokens, mask))


def parameters(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, module.length), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_full_size_counts():
    assert parameters(CLIPTextEncoder(**H)) == 352_984_064
    assert parameters(CLIPTextEncoder(**BIG_G)) == 693_021_440
    assert parameters(CLIPTextEncoder(**BIG_G, projection=1280)) == 693_021_440 + 1280**2
    # 4 blocks of 12 D^2 + 13 D, the final norm, the embeddings.
    assert parameters(SmallTextEncoder(vocabulary=300, length=32)) == 4 * (12 * 128**2 + 13 * 128) + 256 + 332 * 128


@pytest.mark.parametrize("preset", [H, BIG_G])
def test_full_size_shapes(preset):
    encoder = CLIPTextEncoder(**preset, dtype=jnp.bfloat16)
    tokens, mask = jax.ShapeDtypeStruct((2, 77), jnp.int32), jax.ShapeDtypeStruct((2, 77), bool)
    out, variables = jax.eval_shape(encoder.init_with_output, jax.random.key(0), tokens, mask)
    assert out["tokens"].shape == (2, 77, preset["width"]) and out["pooled"].shape == (2, preset["width"])
    assert out["tokens"].dtype == jnp.bfloat16
    blocks = variables["params"]["transformer"]["blocks"]
    assert {x.shape[0] for x in jax.tree.leaves(blocks)} == {preset["layers"]}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_activations():
    x = jnp.asarray([-2.0, 0.5, 3.0])
    exact = [0.5 * v * (1 + jax.scipy.special.erf(v / np.sqrt(2))) for v in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, rtol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + jnp.exp(-1.702 * x)), rtol=1e-6)


def test_interface(encoder, tokens):
    name, apply = encoder
    out = apply(tokens)
    assert out["tokens"].shape == (2, 7, 12) and out["pooled"].shape == (2, 12)
    assert set(out) == ({"tokens", "pooled", "projected"} if name == "clip" else {"tokens", "pooled"})
    everything = apply(tokens, jnp.ones(tokens.shape, bool))
    jax.tree.map(np.testing.assert_array_equal, out, everything)
    integers = apply(tokens, jnp.ones(tokens.shape, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, out, integers)


def test_who_sees_whom(encoder, tokens):
    """A changed token moves those that see it and no other: the later ones in CLIP, all in the small encoder."""
    name, apply = encoder
    moved = jnp.any(apply(tokens)["tokens"] != apply(tokens.at[:, 2].add(1) % 49)["tokens"], axis=-1)
    unmoved = 2 if name == "clip" else 0
    # Tokens 49 also become 0 by the remainder: compare before them.
    assert moved[:, :4].tolist() == 2 * [[False] * unmoved + [True] * (4 - unmoved)]


def test_what_stands_on_padding_reaches_no_other_token(encoder, tokens):
    _, apply = encoder
    # One text padded at its end; one with a hole, which a causal mask alone does not hide.
    mask = (jnp.arange(7) < jnp.asarray([[5], [6]])).at[1, 2].set(False)
    out, other = apply(tokens, mask), apply(jnp.where(mask, tokens, 7), mask)
    np.testing.assert_array_equal(out["tokens"][mask], other["tokens"][mask])
    np.testing.assert_array_equal(out["pooled"], other["pooled"])
    assert not np.allclose(out["tokens"], other["tokens"])  # it does reach its own place
    # And a padded text is the text alone.
    alone = apply(tokens[:1, :5])
    np.testing.assert_allclose(out["tokens"][:1, :5], alone["tokens"], atol=1e-5)
    np.testing.assert_allclose(out["pooled"][:1], alone["pooled"], atol=1e-5)


def test_padding_on_the_left_is_finite(encoder, tokens):
    _, apply = encoder
    out = apply(tokens, jnp.arange(7) >= jnp.asarray([[2], [0]]))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


def test_pooled(encoder, tokens):
    name, apply = encoder
    mask = jnp.arange(7) < jnp.asarray([[5], [7]])
    out = apply(tokens, mask)
    if name == "clip":
        expected = out["tokens"][:, 4]  # the first of the end tokens
        late = apply(tokens.at[0, 4].set(3))
        np.testing.assert_allclose(late["pooled"][0], late["tokens"][0, 5], atol=1e-6)
    else:
        expected = jnp.stack([out["tokens"][0, :5].mean(0), out["tokens"][1].mean(0)])
    np.testing.assert_allclose(out["pooled"], expected, atol=1e-6)


def test_stacked_blocks_are_a_loop(tokens):
    encoder = CLIPTextEncoder(**ODD, activation="gelu")
    params = jax.jit(encoder.init)(jax.random.key(0), tokens)["params"]["transformer"]
    block = TextBlock(heads=3, hidden=20, activation="gelu", depth=3, dtype=jnp.float32)
    apply = jax.jit(block.apply)
    x = params["token"]["embedding"][tokens] + params["position"][:7]
    for layer in range(3):
        parameters = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        x, _ = apply({"params": parameters}, x, np.tri(7, dtype=bool)[None])
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    found = jax.jit(encoder.apply)({"params": {"transformer": params}}, tokens)["tokens"]
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_bad_sizes_are_named(tokens):
    def init(**changes):
        module = CLIPTextEncoder(**(ODD | {"activation": "gelu"} | changes))
        return jax.eval_shape(module.init, jax.random.key(0), tokens)

    with pytest.raises(ValueError, match="found width 12 with 5 heads, expected a multiple"):
        init(heads=5)
    with pytest.raises(ValueError, match=r"found activation 'relu', expected one of \['gelu', 'quick_gelu'\]"):
        init(activation="relu")
    with pytest.raises(ValueError, match="found 7 tokens a text, expected at most 6"):
        init(length=6)
