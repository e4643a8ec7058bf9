"""The products of `models/products.py` are the plain ones: in values, gradients and tangents."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.products import Dense, attend, product_of_rows


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def agree(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_dense_is_dense(shape):
    x, seed = draw(*shape), draw(*shape[:-1], 7)
    plain, ours = nn.Dense(7), Dense(7)
    params = plain.init(jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(ours.init(jax.random.key(0), x))
    agree(*(jax.jit(model.apply)(params, x) for model in (ours, plain)))
    agree(*(jax.vjp(model.apply, params, x)[1](seed) for model in (ours, plain)))
    agree(*(jax.jvp(lambda x: model.apply(params, x), (x,), (2 * x,)) for model in (ours, plain)))  # noqa: B023


@pytest.mark.parametrize(("backend", "axes"), [("cpu", "[0] x [0]"), ("tpu", "[0, 1] x [0, 1]")])
def test_the_kernels_gradient_is_a_sum_over_one_axis_on_cpu(monkeypatch, backend, axes):
    """What the form is for; elsewhere the product is the plain one."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    product = lambda kernel, x: jnp.sum(product_of_rows(x, kernel, (((2,), (0,)), ((), ()))))  # noqa: E731
    text = jax.jit(jax.grad(product)).lower(draw(5, 7), draw(2, 3, 5)).as_text()
    assert f"contracting_dims = {axes}" in text


def test_attention_is_its_definition():
    q, k, v = draw(2, 3, 4, 8), draw(2, 5, 4, 8), draw(2, 5, 4, 8) + 1

    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    agree(attend(q, k, v), plain(q, k, v))
    agree(*(jax.vjp(f, q, k, v)[1](q) for f in (attend, plain)))
    agree(*(jax.jvp(f, (q, k, v), (k[:, :3], v, q.sum() * v)) for f in (attend, plain)))
    assert attend(*(x.astype(jnp.bfloat16) for x in (q, k, v))).dtype == jnp.bfloat16
