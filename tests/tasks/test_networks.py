"""Every generator under every objective: one task serves them all, and a config's fields reach each network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_consistency_task import DERIVATIVES

from configs import common
from fid_imagegen.diffusion.objectives import OBJECTIVES
from fid_imagegen.diffusion.preconditioning import consistency_function
from fid_imagegen.models.layers import BlockStyle
from fid_imagegen.models.rendering import render

UNSET = {f"model.{name}": None for name in ("function_width", "function_depth", "bands", "groups")}
RIVALS = {
    "dit": {"model.network": "dit", "model.heads": 2, "model.depth": 2, "model.qk_norm": True},
    "unet": {
        "model.network": "unet",
        "model.preset": "ncsnpp_32",
        "model.unet.stem": 8,
        "model.unet.blocks": 1,
        "model.unet.widths": (8, 12),
        "model.unet.attention_levels": (1,),
        "model.unet.fourier_scale": 0.02,
    },
    "uvit": {"model.network": "uvit", "model.heads": 2, "model.depth": 2, "model.qk_norm": True},
    "low_rank": {"model.weight_update": "low_rank", "model.integrated": True},
    "local": {"model.function": "local64"} | UNSET,
    "patches": {"model.function": "patch32"} | UNSET,
    "pixels": {"model.function": "pixel32"} | UNSET,
}
SAMPLERS = {"ct": "consistency", "edm": "heun", "meanflow": "flow"}  # an objective of each; others share the first
COMPUTED = ("ect", "sct")  # objectives whose gradients are computed on every rival, not only traced
# What the suite runs of all pairs: every objective, every network, the derivative through attention and through convolutions.
SUITE = {("ect", network) for network in RIVALS} | {(objective, "function") for objective in OBJECTIVES}
SUITE |= {("sct", "dit"), ("sct", "unet"), ("cd", "unet"), ("meanflow", "unet"), ("meanflow", "styled")}
STYLED = RIVALS["dit"] | {"model.norm": "rms", "model.mlp": "swiglu", "model.rotary": True}


def pairs(choose):
    """Those of (objective, network) that `choose` takes; what is not in `SUITE` is slow."""
    every = filter(choose, itertools.product(OBJECTIVES, ("function", "styled", *RIVALS)))
    return [pytest.param(*pair, marks=[] if pair in SUITE else pytest.mark.slow) for pair in every]


def computed(pair):
    return pair[0] in COMPUTED and pair[1] in RIVALS


@pytest.mark.parametrize(("objective", "network"), pairs(computed))
def test_every_network_goes_through_the_same_task(tiny_task, random_params, batch, network, objective):
    task = tiny_task(RIVALS[network] | (DERIVATIVES["sct"] if objective == "sct" else {}) | {"model.num_classes": 3})
    # Values of 40, which wider draws make of pixels, are rounded by more than the bound below.
    params = random_params(task, deviation=0.2 if network == "pixels" else 0.3)
    loss = lambda params: task.loss(params, {}, batch, jax.random.key(3), jnp.asarray(5))[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    still = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(leaf)]
    assert np.isfinite(value) and not still
    functions = jax.jit(functools.partial(task.sample, steps=2))(params, jax.random.key(0), jnp.arange(3))
    labels, net = jnp.asarray([0, 1, 2]), jax.jit(task._net(params["generator"], training=False))
    x, sigma = functions.native.noisy, jnp.full(3, 0.821)
    f = consistency_function(net, x, sigma, labels, key=None, noise=task.noise, form=task.form)
    np.testing.assert_allclose(render(functions, 8, 8), f, atol=2e-5)
    assert render(functions, 20, 13).shape == (3, 20, 13, 1)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"model.weight_update": "low_rank"}, ()),
        (RIVALS["dit"], ()),
        (RIVALS["uvit"], ()),
        (RIVALS["unet"], ("patch", "unroll", "level_scale")),
        ({"model.network": "unet", "model.preset": "adm_64"}, ("patch", "unroll")),
    ],
    ids=["function", "dit", "uvit", "ncsnpp", "adm"],
)
def test_what_a_config_says_reaches_the_network(tiny_task, changes, lacks):
    fields = {"num_classes": 3, "dropout": 0.25, "remat": True, "dtype": "bfloat16", "patch": 2}
    fields = {
        name: value for name, value in (fields | {"unroll": True, "level_scale": 7.0}).items() if name not in lacks
    }
    own = changes | {f"model.{name}": value for name, value in fields.items()}
    model = tiny_task(own).model
    assert {name: getattr(model, name) for name in fields} == fields
    if changes == {"model.weight_update": "low_rank"}:
        assert (model.kind.dtype, model.kind.weight_update, model.kind.width) == ("bfloat16", "low_rank", 16)


@pytest.mark.parametrize(("objective", "network"), pairs(lambda pair: not computed(pair)))
def test_each_objective_runs_on_each_network(tiny_task, batch, network, objective):
    """By shapes alone: networks of meanflow are told two levels, that of cd has a teacher, of ct a target."""
    changes = {"objective": common.objective(objective), "distance": "l2"} | DERIVATIVES.get(objective, {})
    network = {"function": {}, "styled": STYLED, **RIVALS}[network]
    task = tiny_task(network | changes | {"model.num_classes": 3, "label_dropped": 0.1})
    params = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])
    others = dict.fromkeys((*task.tracked, *task.frozen()), params["generator"])
    run = lambda params, others: task.loss(params | others, {}, batch, jax.random.key(0), jnp.int32(3))[0]  # noqa: E731
    gradient = jax.eval_shape(jax.grad(run), params, others)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    if objective not in SAMPLERS:
        assert task.objective.sampler == "consistency"
        return
    assert task.objective.sampler == SAMPLERS[objective]
    draw = functools.partial(task.sample, steps=2, guidance=2.0)
    made = jax.eval_shape(draw, params, jax.random.key(0), jnp.arange(4))
    assert made.native.noisy.shape == (4, 8, 8, 1)


@pytest.mark.parametrize("network", ["dit", "function"])
def test_a_network_has_the_style_of_its_config(tiny_task, network):
    styled = {name: value for name, value in STYLED.items() if name != "model.network"}
    style = tiny_task(styled | {"model.network": network}).model.style
    assert style == BlockStyle(norm="rms", mlp="swiglu", qk_norm=True, rotary=True)
    assert tiny_task({"model.network": network}).model.style == BlockStyle()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_uvit_norms_queries_and_keys_where_its_config_says_so(tiny_task, qk_norm):
    task = tiny_task(RIVALS["uvit"] | {"model.qk_norm": qk_norm})
    params = jax.eval_shape(task.init, jax.random.key(0))[0]["generator"]
    for stack in ("encoder", "decoder"):
        assert ("query_norm" in params[stack]["attention"], "key_norm" in params[stack]["attention"]) == 2 * (qk_norm,)
