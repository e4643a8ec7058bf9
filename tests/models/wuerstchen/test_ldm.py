import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from fid_imagegen.models.wuerstchen.blocks import ConvBlock, layer_norm, level_embedding
from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv
from fid_imagegen.models.wuerstchen.ldm import PAPER_BASELINE, BaselineBlock, LatentUNet
from fid_imagegen.models.wuerstchen.stage_b import Upsample

TINY = {
    "channels": 3,
    "widths": (4, 8),
    "heads": (1, 2),
    "blocks": (1, 2),
    "text_width": 5,
    "level_width": 8,
    "dropout": 0.1,
}

ONE_RESOLUTION = TINY | {"widths": (4,), "heads": (2,), "blocks": (2,)}  # compiles in a third of the time


def shapes(model):
    side = 2 ** (len(model.widths) - 1)
    args = jnp.zeros((1, side, side, model.channels)), jnp.zeros(1), jnp.zeros((1, 4, model.text_width))
    return jax.eval_shape(lambda key: model.init(key, *args, method="end_to_end"), jax.random.key(0))["params"]


def random_params(fields):
    generator = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.5 * generator.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes(LatentUNet(**fields)))


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


def attention(params, x, tokens, heads):
    """x + attention of the normed x to the tokens, from the definition; both [batch, tokens, features]."""
    project = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    q, k, v = project("query", layer_norm(x)), project("key", tokens), project("value", tokens)
    q, k, v = (np.stack(np.split(np.asarray(y), heads, axis=-1)) for y in (q, k, v))
    weights = jax.nn.softmax(np.einsum("hbqd,hbkd->hbqk", q, k) / np.sqrt(q.shape[-1]))
    out = np.einsum("hbqk,hbkd->hbqd", weights, v)
    return x + project("out", np.concatenate(list(out), axis=-1))


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(2, 4, 6, 3), jnp.asarray([0.2, 0.9]), draw(2, 3, 5)


def bind(fields):
    model = LatentUNet(**fields)
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method="end_to_end"))


@pytest.fixture(scope="module")
def run(params):
    call = bind(TINY)
    return lambda *args: call(params, *args)


def test_it_has_the_parameters_of_the_paper():
    counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(LatentUNet(**PAPER_BASELINE))))
    assert counted == 993_065_288  # 0.99 B


def test_an_untrained_network_gives_zeros_in_float32(inputs):
    model = LatentUNet(**ONE_RESOLUTION, dtype=jnp.bfloat16)
    init = lambda key: model.init_with_output(key, *inputs, method="end_to_end")[0]  # noqa: E731
    for part in jax.jit(init)(jax.random.key(0)):
        assert part.shape == inputs[0].shape and part.dtype == jnp.float32 and not part.any()


def test_a_block_takes_the_skip_then_time_then_text(params):
    generator = np.random.default_rng(2)
    x, skip = jnp.asarray(generator.standard_normal((2, 2, 4, 6, 8)), jnp.float32)
    time, text = jnp.asarray(generator.standard_normal((2, 2, 3, 5)), jnp.float32)
    own = jax.tree.map(lambda leaf: leaf[0], params["up_0"])
    block = BaselineBlock(8, 2, True, 0.1, 1.0)
    keys_values = block.apply({"params": own}, None, text, method="condition")[1]
    ours, kept = block.apply({"params": own}, x, time, skip, keys_values, True)
    h = x + DepthwiseConv().apply({"params": own["skip_conv"]}, skip)
    h = ConvBlock(3, 0.1, 1.0).apply({"params": own["residual"]}, h, None, True).reshape(2, 24, 8)
    h = attention(own["text"], attention(own["time"], h, time, 2), text, 2)
    np.testing.assert_allclose(ours, h.reshape(x.shape), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(kept, ours)


def test_it_is_the_u_net_block_by_block(params, inputs, run):
    """The scans, written out: each decoder block takes the encoder's last output that is left."""
    x, r_B, text = inputs
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731

    def level(name, h, i, skips):
        for layer in range(TINY["blocks"][i] + (skips is not None)):
            own = {"params": jax.tree.map(lambda leaf, n=layer: leaf[n], params[name])}
            block = BaselineBlock(TINY["widths"][i], TINY["heads"][i], skips is not None, 0.1, 1.0)
            keys_values = block.apply(own, None, text, method="condition")[1]
            h, _ = block.apply(own, h, time, skips.pop() if skips is not None else None, keys_values, True)
            if skips is None:
                outputs.append(h)
        return h

    @jax.jit
    def unrolled():
        h = layer_norm(dense("embedding", x))
        outputs.append(h)
        h = level("down_0", h, 0, None)
        h = nn.Conv(8, (2, 2), (2, 2), padding="VALID").apply({"params": params["downsample_0"]}, layer_norm(h))
        outputs.append(h)
        h = level("down_1", h, 1, None)
        h = level("up_0", h, 1, outputs)
        h = Upsample(4).apply({"params": params["upsample_0"]}, layer_norm(h))
        return jnp.split(dense("out", layer_norm(level("up_1", h, 0, outputs))), 2, axis=-1)

    outputs = []
    time = dense("time_mapper", level_embedding(r_B, 8)).reshape(2, 4, 5)
    expected = unrolled()
    assert not outputs
    for ours, theirs in zip(run(*inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_rematerialised_loop_equals_the_scan(inputs):
    params = random_params(ONE_RESOLUTION)

    def values_and_gradients(**changes):
        call = bind(ONE_RESOLUTION | changes)
        return jax.value_and_grad(lambda p: sum(jnp.sum(part**2) for part in call(p, *inputs)))(params)

    (value, gradients), (other, others) = values_and_gradients(), values_and_gradients(remat=True, unroll=True)
    assert other == pytest.approx(float(value), rel=1e-4)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for path, leaf in flatten_dict(gradients).items():
        np.testing.assert_allclose(flatten_dict(others)[path], leaf, rtol=1e-3, atol=1e-5 * largest)
        # A key's bias adds the same to all logits of a query; all other parameters take part.
        assert np.abs(leaf).max() > 1e-6 * largest or path[-2:] == ("key", "bias")


def test_a_condition_made_once_serves_every_level(params, inputs, run):
    model, (x, _, text) = LatentUNet(**TINY), inputs
    cond = jax.jit(lambda p: model.apply({"params": p}, text, method="condition"))(params)
    call = jax.jit(lambda p, x, r, cond: model.apply({"params": p}, x, r, cond))
    for level in (0.1, 0.7):
        r_B = jnp.full((2,), level)
        np.testing.assert_allclose(call(params, x, r_B, cond)[0], run(x, r_B, text)[0], rtol=1e-4, atol=1e-4)


def test_levels_and_text_count_and_images_do_not_mix(inputs, run):
    x, r_B, text = inputs
    a = run(*inputs)[0]
    assert np.abs(run(x, r_B + 0.05, text)[0] - a).max() > 1e-2
    assert np.abs(run(x, r_B, text[::-1])[0] - a).max() > 1e-2
    changed = run(x.at[0].add(1.0), r_B, text)[0]
    np.testing.assert_allclose(changed[1], a[1], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[0] - a[0]).max() > 1e-2


def test_errors_say_what_to_change(inputs):
    x, r_B, text = inputs

    def init(x, **changes):
        model = LatentUNet(**TINY | changes)
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, r_B, text, method="end_to_end"))

    with pytest.raises(ValueError, match="found latents of 3x6, expected multiples of 2"):
        init(x[:, :3])
    with pytest.raises(ValueError, match="found widths .* expected multiples"):
        init(x, heads=(1, 3))
    with pytest.raises(ValueError, match="one entry a resolution"):
        init(x, heads=(1,))
    with pytest.raises(ValueError, match="found latents of shape .* expected 3 channels"):
        init(x[..., :2])
