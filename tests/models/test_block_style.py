"""RMS norms, gated MLPs and rotary positions: against their definitions in numpy, and where they reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models import layers
from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.dit import DITS, DiT
from fid_imagegen.models.function_generator import FunctionGenerator
from fid_imagegen.models.layers import AdaLNZeroBlock, BlockStyle, DecoderBlock, SwiGLU, rms_norm, stack
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.rotary import rotary_angles

ROWS, COLUMNS, WIDTH, HEADS = 2, 3, 16, 2
STYLE = BlockStyle(norm="rms", mlp="swiglu", qk_norm=True, rotary=True)  # the decoder's queries and keys are not normed
ANGLES = rotary_angles(ROWS, COLUMNS, WIDTH // HEADS)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


X, CONDITION, CONTEXT = draw(2, ROWS * COLUMNS, WIDTH), draw(2, WIDTH, seed=1), draw(2, ROWS * COLUMNS, WIDTH, seed=2)
# What each block is called with.
BLOCKS = {AdaLNZeroBlock: (X, CONDITION, True, ANGLES), DecoderBlock: (X, CONTEXT, ANGLES)}


def as_float(args, dtype):
    return [jnp.asarray(x, dtype) if getattr(x, "dtype", None) == np.float64 else x for x in args]


def randomised(module, *args):
    """Parameters in float64, every one drawn: an untrained block is the identity and would hide errors."""
    generator = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *as_float(args, jnp.float32)))["params"]
    return jax.tree.map(lambda leaf: 0.3 * generator.standard_normal(leaf.shape), shapes)


def apply(module, params, args, dtype=jnp.float32):
    return module.apply({"params": jax.tree.map(lambda x: jnp.asarray(x, dtype), params)}, *as_float(args, dtype))


# The definitions, in float64.


def rms(x, scale=1.0):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(params, x):
    hidden = silu(x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"]


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def turned(x):
    """[batch, heads, tokens, 8] by complex numbers."""
    row, column = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    phases = np.stack([row, row / 100, column, column / 100], axis=1)  # 10,000^(-k / 2)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * phases)
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(params, queries, context, rotation=lambda x: x):
    def project(name, x):
        x = np.stack(np.split(dense(params[name], x), HEADS, axis=-1), axis=1)  # [batch, heads, tokens, 8]
        return rms(x, params[f"{name}_norm"]["scale"]) if f"{name}_norm" in params else x

    q, k, v = rotation(project("query", queries)), rotation(project("key", context)), project("value", context)
    weights = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(WIDTH // HEADS))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return dense(params["out"], np.concatenate(list(np.swapaxes(out, 0, 1)), axis=-1))


def adaln_zero(params):
    modulation = dense(params["modulation"], silu(CONDITION))[:, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(modulation, 6, axis=-1)
    h = rms(X) * (1 + scale_a) + shift_a
    y = X + gate_a * attention(params["attention"], h, h, turned)
    return y + gate_m * swiglu(params["mlp"], rms(y) * (1 + scale_m) + shift_m)


def decoder(params):
    h = rms(X, params["norm_self"]["scale"])
    y = X + attention(params["self_attention"], h, h, turned)
    y = y + attention(params["cross_attention"], rms(y, params["norm_cross"]["scale"]), CONTEXT)
    return y + swiglu(params["mlp"], rms(y, params["norm_mlp"]["scale"]))


@pytest.mark.parametrize("affine", [True, False])
def test_an_rms_norm_is_its_definition(affine):
    """Of a mean that is not subtracted, and of features so small that epsilon counts."""
    params, module = {"scale": draw(8, seed=1)} if affine else {}, rms_norm(affine=affine, dtype=jnp.float32)
    for x in (3 + draw(2, 5, 8), 1e-3 * draw(2, 5, 8)):
        np.testing.assert_allclose(apply(module, params, [x]), rms(x, params.get("scale", 1.0)), rtol=1e-5, atol=1e-6)


def test_a_gated_mlp_is_its_definition():
    module = SwiGLU()
    params = randomised(module, X)
    assert {name: leaf["kernel"].shape for name, leaf in params.items()} == {
        "gate": (16, 48),
        "up": (16, 48),
        "down": (48, 16),
    }
    np.testing.assert_allclose(apply(module, params, [X]), swiglu(params, X), atol=1e-5)


@pytest.mark.parametrize(("block", "definition"), [(AdaLNZeroBlock, adaln_zero), (DecoderBlock, decoder)])
def test_a_block_of_all_three_is_its_definition(block, definition):
    module, args = block(HEADS, style=STYLE), BLOCKS[block]
    params = randomised(module, *args)
    np.testing.assert_allclose(apply(module, params, args)[0], definition(params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_mode_goes_through_all_three(block):
    """sct and meanflow differentiate forwards; in float64."""
    with jax.enable_x64(True):
        module = block(HEADS, style=STYLE, dtype=jnp.float64)
        x, *others = BLOCKS[block]
        params = randomised(module, x, *others)
        run = jax.jit(lambda x: apply(module, params, (x, *others), jnp.float64)[0])
        x, direction, step = jnp.asarray(x), jnp.cos(x), 1e-5
        tangent = jax.jvp(run, (x,), (direction,))[1]
        assert tangent.dtype == jnp.float64 and np.abs(tangent).max() > 0.1
        numeric = (run(x + step * direction) - run(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(tangent, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("block", BLOCKS)
def test_an_unrolled_loop_equals_the_scan(block):
    """Rematerialised too, on one tree of parameters; angles are the same in every layer."""
    args = BLOCKS[block]
    static = (3,) if block is AdaLNZeroBlock else ()
    plain, other = (
        stack(block, 2, remat=flag, unroll=flag, static_argnums=static, heads=HEADS, style=STYLE)
        for flag in (False, True)
    )
    params = randomised(plain, *args)
    one, two = (jax.jit(lambda p, m=model: apply(m, p, args)[0])(params) for model in (plain, other))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(16, 48), (128, 344), (384, 1024), (512, 1408), (1152, 3072)])
def test_gated_mlps_are_two_thirds_as_wide(width, hidden):
    assert SwiGLU.hidden(width) == hidden
    assert 8 * width / 3 <= hidden < 8 * width / 3 + (64 if width >= 512 else 8)


def shapes(model, size=(8, 8)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)), jnp.zeros((1, 1)))["params"]


def test_a_gated_dit_has_as_many_parameters():
    plain, gated = (
        sum(x.size for x in jax.tree.leaves(shapes(DiT(channels=3, patch=2, style=BlockStyle(mlp=mlp), **DITS["S"]))))
        for mlp in ("gelu", "swiglu")
    )
    assert plain != gated and gated == pytest.approx(plain, rel=0.01)


GLOBAL = CoordinateMLP(channels=3, width=8, depth=3, bands=2, groups=4, cutoff=4.0, weight_update="scale")
LOCAL = LocalMLP(channels=3, rows=2, columns=2, features=5, width=7, depth=2)
GENERATOR = FunctionGenerator(GLOBAL, image_size=8, patch=4, width=16, heads=2, extractor_depth=1, predictor_depth=1)
TRUNKS = {
    "dit": DiT(channels=3, patch=4, width=16, heads=2, depth=1),
    "global": GENERATOR,
    "local": GENERATOR.clone(kind=LOCAL),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_a_style_reaches_every_block_and_norm(name, monkeypatch):
    """Angles are of rows and columns: the image of DiT is no square. A predictor asks for them if its tokens are patches."""
    asked = []
    monkeypatch.setattr(layers, "rotary_angles", lambda *args: asked.append(args) or rotary_angles(*args))
    model, size = TRUNKS[name], (8, 12) if name == "dit" else (8, 8)
    styled, plain = (
        {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}
        for tree in (shapes(model.clone(style=style), size) for style in (STYLE, BlockStyle(qk_norm=True)))
    )
    assert asked == {"dit": [(2, 3, 8)], "global": [(2, 2, 8)], "local": 2 * [(2, 2, 8)]}[name]
    biases = {path for path in plain if path.endswith("bias") and ("norm" in path or "/mlp/" in path)}
    gates = {path.replace("/up/", "/gate/") for path in plain if path.endswith("mlp/up/kernel")}
    assert styled == plain - biases | gates
    assert len(gates) == (1 if name == "dit" else 2)


@pytest.mark.parametrize(("name", "predictors"), [("global", False), ("local", True)])
def test_tokens_of_images_are_turned_and_those_of_weights_are_not(name, predictors):
    """In the extractor of either generator; pre-training passes it by and shows the predictor alone."""
    model, x = TRUNKS[name], jnp.asarray(draw(1, 8, 8, 3), jnp.float32)
    params = randomised(model, x, jnp.zeros((1, 1)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(style):
        bound = model.clone(style=style).bind({"params": params})
        return bound(x, jnp.zeros((1, 1))).per_image, bound.reconstruct(x).per_image

    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run(BlockStyle()), run(BlockStyle(rotary=True)))
    whole, alone = (max(jax.tree.leaves(each)) for each in moved)
    assert whole > 1e-3 and (alone > 1e-3) == predictors


def test_the_norm_after_dits_blocks_is_of_their_style():
    """Behind closed gates it is the only one; neither norm has parameters here."""
    model, x = TRUNKS["dit"], jnp.asarray(draw(1, 8, 8, 3), jnp.float32)
    params = randomised(model, x, jnp.zeros((1, 1)))
    params["extractor"]["blocks"]["modulation"] = jax.tree.map(
        np.zeros_like, params["extractor"]["blocks"]["modulation"]
    )
    layer, other = (
        jax.jit(model.clone(style=BlockStyle(norm=norm)).apply)({"params": params}, x, jnp.zeros((1, 1)))
        for norm in ("layer", "rms")
    )
    assert np.abs(layer - other).max() > 1e-2
