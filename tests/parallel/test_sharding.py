import logging as std_logging

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.sharding import PartitionSpec

from configs import common
from fid_imagegen import tasks
from fid_imagegen.parallel.mesh import make_mesh
from fid_imagegen.parallel.sharding import path_name, resolve
from fid_imagegen.training import optimizer, state

TREE = {
    "blocks": {"up": {"kernel": (4, 16, 64), "bias": (64, 16)}, "down": {"kernel": (4, 64, 16)}},
    "embed": {"kernel": (3, 3, 8, 64)},
    "bias": (6,),
}


@pytest.fixture
def mesh():
    return make_mesh(2, 2, 2)


@pytest.fixture
def absl_log(caplog):
    logging.use_absl_handler()
    logger = std_logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def specs(rules, mesh, tree=TREE, min_size=0):
    arrays = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), {"params": tree}, is_leaf=lambda x: isinstance(x, tuple)
    )
    resolved = resolve(rules, arrays, mesh, min_size=min_size)
    return {path_name(path)[7:]: tuple(leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(resolved)}


def test_the_first_rule_that_matches_decides(mesh):
    first = specs([("up/kernel$", ["-", "fsdp", "tensor"]), ("kernel", "replicate"), (".*", "fsdp")], mesh)
    assert first["blocks/up/kernel"] == (None, "fsdp", "tensor")
    assert first["blocks/down/kernel"] == first["embed/kernel"] == ()
    assert first["bias"] == ("fsdp",)
    swapped = specs([("kernel", "replicate"), (".*", "fsdp")], mesh)
    assert swapped["blocks/up/kernel"] == ()


def test_fsdp_cuts_the_largest_dimension_that_divides(mesh):
    found = specs([(".*", "fsdp")], mesh)
    assert found["blocks/up/kernel"] == (None, None, "fsdp")
    assert found["blocks/down/kernel"] == (None, "fsdp")
    assert found["embed/kernel"] == (None, None, None, "fsdp")
    assert specs([(".*", "fsdp")], mesh, {"odd": (7, 6)}) == {"odd": (None, "fsdp")}
    assert specs([(".*", "fsdp")], mesh, {"odd": (7, 5)}) == {"odd": ()}


def test_fsdp_never_cuts_the_layers_of_a_stack(mesh):
    # More layers than features, so that the largest dimension is the stack: it is scanned over, and cut it would be gathered.
    found = specs([(".*", "fsdp")], mesh, {"blocks": {"bias": (64, 16), "scale": (64, 3), "kernel": (64, 3, 5)}})
    assert found == {"blocks/bias": (None, "fsdp"), "blocks/scale": (), "blocks/kernel": ()}


def test_small_arrays_stay_whole(mesh):
    found = specs([("up/kernel$", ["-", "fsdp", "tensor"]), (".*", "fsdp")], mesh, min_size=4096)
    assert found["blocks/up/kernel"] == (None, "fsdp", "tensor")
    assert found["blocks/up/bias"] == found["bias"] == ()


def test_a_dimension_that_does_not_divide_stays_whole_and_is_logged(mesh, absl_log):
    found = specs([(".*", ["tensor", "fsdp"])], mesh, {"odd": (3, 4)})
    assert found == {"odd": (None, "fsdp")}
    assert "params/odd (3, 4): dimension 0 does not divide over tensor; it stays whole" in absl_log.text


@pytest.mark.parametrize(
    ("network", "preset"),
    [("unet", "ncsnpp_32"), ("unet", "adm_64"), ("uvit", "tiny"), ("dit", "tiny"), ("function", "tiny")],
)
def test_every_network_lies_on_a_mesh_by_the_rules_of_the_configs(network, preset, mesh):
    config = common.base()
    config.model.update({"network": network, "preset": preset})
    common.runlocal(config)
    tree = jax.eval_shape(tasks.build(config).init, jax.random.key(0))[0]
    rules = common.UNET_RULES if network == "unet" else config.sharding.rules
    shardings = resolve(rules, tree, mesh, min_size=0)
    cut = {path_name(path): where.spec for path, where in jax.tree_util.tree_leaves_with_path(shardings)}
    assert any("tensor" in spec for spec in cut.values()) == (network != "unet")
    assert all("fsdp" in spec for name, spec in cut.items() if name.endswith("conv_out/kernel"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel", "fsdp")], "no sharding rule for params/bias, expected one to match"),
        ([("kernal", "fsdp"), ("nothing", "fsdp"), (".*", "fsdp")], r"match nothing: \['kernal', 'nothing'\]"),
        ([(".*", "fsdp"), ("kernel", "replicate")], r"match nothing: \['kernel'\]"),  # never reached
        ([("embed", ["-", "-", "fsdp", "fsdp"]), (".*", "fsdp")], "two dimensions on one mesh axis"),
        ([(".*", "zero")], "tactic 'zero' for params/bias, expected 'replicate', 'fsdp' or a list"),
        ([("embed", ["-", "-", "-", "model"]), (".*", "fsdp")], r"mesh axes \['model'\] in the rule for params/embed"),
        ([("embed", ["fsdp"]), (".*", "fsdp")], r"found 1 axes in the rule for params/embed/kernel, expected 4"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message, mesh):
    with pytest.raises(ValueError, match=message):
        specs(rules, mesh)


def test_every_kernel_of_a_gated_mlp_is_cut_along_its_inner_axis(tiny, mesh):
    config = tiny(**{"model.mlp": "swiglu"})
    tree = jax.eval_shape(tasks.build(config).init, jax.random.key(0))[0]
    found = resolve(config.sharding.rules, tree, mesh, min_size=0)["generator"]
    for mlp in (found["extractor"]["blocks"]["mlp"], found["predictor"]["blocks"]["mlp"]):
        cuts = {name: leaf["kernel"].spec for name, leaf in mlp.items()}
        inner = PartitionSpec(None, "fsdp", "tensor")
        assert cuts == {"gate": inner, "up": inner, "down": PartitionSpec(None, "tensor", "fsdp")}


def test_averages_targets_and_optimizer_states_lie_like_their_parameters(tiny, mesh):
    config = tiny()
    task = tasks.build(config)
    optimizers = optimizer.build_all(config, task.trained)
    abstract = jax.eval_shape(lambda key: state.create(task, optimizers, ("0.9", "0.99"), key), jax.random.key(0))
    shardings = resolve(config.sharding.rules, abstract, mesh, min_size=0)

    def flat(tree):
        return {path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    params = flat(shardings.params["generator"])
    assert params["extractor/blocks/mlp/up/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert params["extractor/blocks/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert flat(shardings.tracked["target"]) == params
    assert flat(shardings.ema["0.9"]["generator"]) == flat(shardings.ema["0.99"]["generator"]) == params
    moments = flat(shardings.opt_state["generator"])
    mirrored = [name for name in moments if name.split("/", 2)[-1] in params]
    assert len(mirrored) == 2 * len(params)  # both moments of every parameter; what is left are step counters
    assert all(moments[name] == params[name.split("/", 2)[-1]] for name in mirrored)
    assert all(moments[name] == PartitionSpec() for name in set(moments) - set(mirrored))
