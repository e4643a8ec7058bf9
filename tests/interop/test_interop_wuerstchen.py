import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.interop.wuerstchen import (
    abstract_params,
    from_state_dict,
    join_projections,
    load_stage,
    name_table,
    split_projections,
    to_state_dict,
    torch_shapes,
)
from fid_imagegen.models.wuerstchen.stage_b import PUBLIC_STAGE_B, StageB
from fid_imagegen.models.wuerstchen.stage_c import PUBLIC_STAGE_C, StageC

SMALL_C = {"c_in": 4, "c": 16, "c_cond": 8, "c_r": 8, "depth": 2, "nhead": 4, "dropout": 0.1}
ODD_C = {"c_in": 3, "c": 21, "c_cond": 5, "c_r": 7, "depth": 3, "nhead": 3, "dropout": 0.1}
SMALL_B = {
    "c_in": 4,
    "c_r": 8,
    "patch_size": 2,
    "c_cond": 16,
    "c_hidden": (16, 32, 48),
    "nhead": (-1, 4, 6),
    "blocks": (2, 1, 2),
    "level_config": ("CT", "CTA", "CTA"),
    "inject_effnet": (False, True, True),
    "effnet_embd": 16,
    "clip_embd": 12,
    "kernel_size": 3,
    "dropout": 0.1,
    "text": True,
}
ODD_B = SMALL_B | {
    "c_in": 3,
    "c_r": 9,
    "patch_size": 3,
    "c_cond": 10,
    "c_hidden": (6, 15, 9),
    "nhead": (2, 5, -1),
    "blocks": (1, 3, 2),
    "level_config": ("CTA", "CTA", "CT"),
    "inject_effnet": (True, False, True),
    "effnet_embd": 5,
    "clip_embd": 7,
    "kernel_size": 5,
}
MODELS = {
    "small C": StageC(**SMALL_C),
    "odd C": StageC(**ODD_C),
    "small B": StageB(**SMALL_B),
    "odd B": StageB(**ODD_B),
    "B without text": StageB(**SMALL_B | {"text": False}),
}


def random_tensors(model):
    """Every tensor at random, PyTorch's layout: weights about as large as trained ones, no bias or response norm at zero."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in torch_shapes(model).items():
        fan_in = math.prod(shape[1:]) if name.endswith("weight") else 10
        # Stage C's noise estimate is divided by |1 - b|: b stays away from one.
        scale = (0.1 if name.startswith("out.1.") else 1) / np.sqrt(fan_in)
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


@pytest.mark.parametrize(
    ("model", "tensors", "values"),
    [(StageB(**PUBLIC_STAGE_B), 990, 1_055_365_280), (StageC(**PUBLIC_STAGE_C), 648, 993_636_896)],
    ids=["B", "C"],
)
def test_the_public_models_tensors_are_all_named(model, tensors, values):
    table = name_table(model)
    names = [name for entry in table.values() for name in entry.names]
    assert len(names) == len(set(names)) == tensors
    assert set(table) == set(flatten_dict(abstract_params(model)))
    assert sum(math.prod(shape) for shape in torch_shapes(model).values()) == values


def test_shapes_of_the_public_models():
    """The ones that tell the networks' parts apart, from the released files."""
    found = torch_shapes(StageB(**PUBLIC_STAGE_B)) | torch_shapes(StageC(**PUBLIC_STAGE_C))
    expected = {
        "clip_mapper.weight": (1024, 1024),
        "effnet_mappers.6.weight": (1024, 16, 1, 1),
        "embedding.1.weight": (320, 16, 1, 1),
        "down_blocks.0.6.depthwise.weight": (320, 1, 3, 3),
        "down_blocks.0.7.mapper.weight": (640, 64),
        "down_blocks.1.0.1.weight": (640, 320, 2, 2),
        "down_blocks.1.1.channelwise.0.weight": (2560, 1664),
        "down_blocks.2.42.attention.to_out.0.weight": (1280, 1280),
        "up_blocks.0.12.1.weight": (1280, 1280, 2, 2),
        "up_blocks.1.0.channelwise.0.weight": (5120, 3584),
        "up_blocks.1.42.1.weight": (1280, 640, 2, 2),
        "up_blocks.2.0.channelwise.0.weight": (2560, 2304),
        "up_blocks.2.12.1.bias": (320,),
        "up_blocks.3.0.channelwise.0.weight": (1280, 640),
        "up_blocks.3.6.channelwise.2.gamma": (1, 1, 1, 1280),
        "clf.1.weight": (32, 320, 1, 1),
        "projection.weight": (1536, 16, 1, 1),
        "cond_mapper.0.weight": (1536, 1280),
        "blocks.93.channelwise.4.weight": (1536, 6144),
        "blocks.95.kv_mapper.1.weight": (1536, 1536),
        "out.1.weight": (32, 1536, 1, 1),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trips_lose_nothing(model, tmp_path):
    tensors = random_tensors(model)
    authors = join_projections(dict(reversed(tensors.items())))  # the order of a file says nothing
    assert len(authors) < len(tensors) and any("attn.in_proj_weight" in name for name in authors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    params = load_stage(model, tmp_path / "theirs.safetensors")
    for found in (to_state_dict(model, params), to_state_dict(model, from_state_dict(model, authors, "the test"))):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    np.testing.assert_equal(
        dict(sorted(join_projections(split_projections(authors)).items())), dict(sorted(authors.items()))
    )


def test_stacks_hold_the_blocks_in_order():
    tensors = random_tensors(MODELS["odd B"])
    params = from_state_dict(MODELS["odd B"], tensors, "the test")
    first, rest = params["up_1"]["first"]["attention"]["query"], params["up_1"]["blocks"]["attention"]["query"]
    for k, kernel in enumerate([first["kernel"], *rest["kernel"]]):
        np.testing.assert_array_equal(kernel, tensors[f"up_blocks.1.{3 * k + 2}.attention.to_q.weight"].T)
    for k, kernel in enumerate(params["down_1"]["blocks"]["residual"]["depthwise"]["kernel"]):
        expected = tensors[f"down_blocks.1.{1 + 3 * k}.depthwise.weight"]
        np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))


def test_wrong_tensors_are_all_listed():
    tensors = random_tensors(MODELS["small C"])
    del tensors["blocks.4.mapper.bias"]
    tensors |= {"blocks.7.mapper.bias": np.zeros(1), "projection.weight": np.zeros((16, 5, 1, 1))}
    with pytest.raises(ValueError, match="do not fit in here") as error:
        from_state_dict(MODELS["small C"], tensors, "here")
    for part in ("missing: blocks.4.mapper.bias", "extra: blocks.7.mapper.bias", "(16, 5, 1, 1) for (16, 4, 1, 1)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "version"), [("clip_txt_mapper.weight", "Stable Cascade"), ("byt5_mapper.weight", "Würstchen v1")]
)
def test_weights_of_another_version_are_named(name, version):
    with pytest.raises(ValueError, match=f"found '{name}' in here: weights of .*{version}"):
        from_state_dict(MODELS["small B"], {name: np.zeros(1)}, "here")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt'.*Würstchen v2's StageC"):
        load_stage(MODELS["small C"], tmp_path / "nothing.pt")


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(
        ValueError, match=r"found '.*cut\.safetensors' unreadable \(Saf.*Würstchen v2's StageC; download"
    ):
        load_stage(MODELS["small C"], tmp_path / "cut.safetensors")


# ---- against diffusers


def torch_twin(model):
    """diffusers' class at this configuration."""
    try:
        from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
    except ModuleNotFoundError:  # diffusers < 0.38
        from diffusers.pipelines.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
    if isinstance(model, StageC):
        return WuerstchenPrior(**{name: getattr(model, name) for name in SMALL_C})
    fields = {name: getattr(model, name) for name in SMALL_B if name != "text"} | {"c_out": model.c_in}
    return WuerstchenDiffNeXt(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})


def inputs(model, dtype):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    r = np.asarray([0.0123, 0.987], dtype)
    if isinstance(model, StageC):
        return draw(2, 5, 7, model.c_in), r, draw(2, 6, model.c_cond)
    step = model.patch_size * 2 ** (len(model.c_hidden) - 1)
    return draw(2, 2 * step, 3 * step, model.c_in), r, draw(2, 5, 7, model.effnet_embd), draw(2, 6, model.clip_embd)


def torch_outputs(twin, model, arrays, monkeypatch):
    """(a, b, noise estimate) of diffusers, channels last."""
    import torch

    to_torch = lambda x: torch.tensor(x).movedim(-1, 1) if x.ndim == 4 else torch.tensor(x)  # noqa: E731
    if isinstance(model, StageC):
        seen = []
        twin.out.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.no_grad():
            noise = twin(*map(to_torch, arrays))
        a, b = seen[0].chunk(2, dim=1)
    else:
        # diffusers resizes in float32 whatever its weights are; in float64 that would hide how near the rest is.
        single = torch.Tensor.float
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
        with torch.no_grad():
            a, b = twin(*map(to_torch, arrays), return_noise=False)
            noise = twin(*map(to_torch, arrays))
    return [x.movedim(1, -1).numpy() for x in (a, b, noise)]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "entry"), [("small C", "ema_state_dict"), ("small B", "state_dict")])
def test_the_authors_files_are_read(name, entry, tmp_path):
    """A .pt file of several state dicts, names and types as theirs; Stage C's EMA is taken before its last step."""
    torch = pytest.importorskip("torch")
    model, tensors = MODELS[name], random_tensors(MODELS[name])
    weights = {k: torch.tensor(v) for k, v in join_projections(tensors).items()}
    others = {"state_dict": {}, "effnet_state_dict": {"backbone.0": torch.zeros(1)}}
    torch.save(others | {entry: weights}, tmp_path / "model.pt")
    found = to_state_dict(model, load_stage(model, tmp_path / "model.pt"))
    for k, tensor in tensors.items():
        np.testing.assert_array_equal(found[k], tensor, err_msg=k)


@pytest.mark.parity
def test_a_file_of_other_entries_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"effnet_state_dict": {}, "step": 3}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"found \['effnet_state_dict', 'step'\] in .*model\.pt', .*or ema_state_dict, or"
    ):
        load_stage(MODELS["small C"], tmp_path / "model.pt")


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["small C", "odd C", "small B", "odd B"])
def test_outputs_match_diffusers(name, dtype, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    model = MODELS[name]
    params = from_state_dict(model, random_tensors(model), "the test")
    save_tree(tmp_path / "ours.safetensors", to_state_dict(model, params), {"format": "pt"})
    twin = torch_twin(model).eval()
    twin.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    twin.to(getattr(torch, np.dtype(dtype).name))
    assert sum(x.numel() for x in twin.parameters()) == sum(x.size for x in jax.tree.leaves(params))
    arrays = inputs(model, dtype)
    expected = torch_outputs(twin, model, arrays, monkeypatch)
    model = model.clone(dtype=jnp.dtype(dtype))
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        run = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays, method="end_to_end"))
        a, b = (np.asarray(x) for x in run(params, *arrays))
    divisor = np.abs(1 - b) + 1e-5 if isinstance(model, StageC) else b
    found = (a, b, (arrays[0] - a) / divisor)
    assert a.dtype == b.dtype == dtype
    errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found, expected, strict=True)]
    print(
        f"\n{name} {np.dtype(dtype).name}: relative error a {errors[0]:.1e}, b {errors[1]:.1e}, noise {errors[2]:.1e}"
    )
    limit = {"C": 1e-5, "B": 1e-4}[name[-1]] if dtype == np.float32 else 1e-12
    assert max(errors) <= limit


@pytest.mark.parity
@pytest.mark.parametrize("model", [StageB(**PUBLIC_STAGE_B), StageC(**PUBLIC_STAGE_C)], ids=["B", "C"])
def test_full_size_names_and_shapes_are_diffusers(model):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        twin = torch_twin(model)
    assert torch_shapes(model) == {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
