import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.dit import abstract_params, from_state_dict, load_dit, to_state_dict
from fid_imagegen.models.dit import PUBLIC_DIT, DiT, column_row_positions
from fid_imagegen.models.layers import BlockStyle

SMALL = DiT(channels=4, patch=2, width=16, heads=2, depth=2, num_classes=5, out_channels=8, level_scale=1.0)
ODD = DiT(channels=3, patch=3, width=36, heads=3, depth=3, num_classes=2, level_scale=1000.0)


def random_params(model, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_params(model))


def theirs(model, **changes):
    """diffusers' model of the same sizes."""
    diffusers = pytest.importorskip("diffusers")
    config = {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.channels,
        "out_channels": model.out_channels,
        "num_layers": model.depth,
        "sample_size": 4 * model.patch,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": 1e-6,
    }
    return diffusers.DiTTransformer2DModel(**config | changes)


def test_tensors_have_diffusers_names_and_layouts():
    params = random_params(SMALL)
    tensors = to_state_dict(SMALL, params)
    assert len(tensors) == 2 * (14 + 4 + 1) + 6
    patches = params["patches"]["kernel"].reshape(2, 2, 4, 16)  # [row, column, in, out]
    np.testing.assert_array_equal(tensors["pos_embed.proj.weight"], patches.transpose(3, 2, 0, 1))
    up = params["extractor"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(tensors["transformer_blocks.1.ff.net.0.proj.weight"], up[1].T)
    for block in range(2):
        table = tensors[f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight"]
        np.testing.assert_array_equal(table, params["extractor"]["label"]["embedding"])
        assert table.shape == (5 + 1, 16)
    assert tensors["proj_out_2.weight"].shape == (2 * 2 * 8, 16)


def test_params_come_back_from_a_file(tmp_path):
    params = random_params(ODD)
    tensors = {name: np.ascontiguousarray(x) for name, x in to_state_dict(ODD, params).items()}
    positions = {"pos_embed.pos_embed": column_row_positions(4, 4, 36)[None]}
    for name, content in {"new": tensors, "old": tensors | positions}.items():
        safetensors.numpy.save_file(content, tmp_path / f"{name}.safetensors")
        loaded = load_dit(ODD, tmp_path / f"{name}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_what_does_not_fit_is_listed(tmp_path):
    tensors = to_state_dict(SMALL, random_params(SMALL))
    with pytest.raises(ValueError, match=r"(?s)missing: transformer_blocks\.2.*extra: strange.*misshapen: .*pos_embed"):
        from_state_dict(ODD, tensors | {"strange": np.zeros(1)}, "here")
    # A patch of 4 of one channel has as many pixels as one of 2 of four channels.
    with pytest.raises(ValueError, match=r"misshapen: pos_embed\.proj\.weight \(16, 4, 2, 2\) for patches/kernel"):
        from_state_dict(SMALL.clone(patch=4, channels=1, out_channels=2), tensors, "here")
    with pytest.raises(ValueError, match=r"missing: transformer_blocks\.0\.attn1\.norm_k\.weight"):
        from_state_dict(SMALL.clone(style=BlockStyle(qk_norm=True)), tensors, "here")
    for style in ({"norm": "rms"}, {"mlp": "swiglu"}, {"rotary": True}):
        styled = SMALL.clone(style=BlockStyle(**style))
        for convert in (
            functools.partial(from_state_dict, styled, tensors, "here"),
            lambda m=styled: to_state_dict(m, {}),
        ):
            with pytest.raises(ValueError, match=r"found a DiT of BlockStyle\(.*, expected norm='layer', mlp='gelu'"):
                convert()
    with pytest.raises(ValueError, match=r"extra: .*class_embedder"):
        from_state_dict(SMALL.clone(num_classes=0), tensors, "here")
    with pytest.raises(FileNotFoundError, match="found no file .*a DiTTransformer2DModel of diffusers.*the folder tr"):
        load_dit(SMALL, tmp_path / "no.safetensors")


@pytest.mark.parametrize("module", ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"])
def test_embedders_that_differ_are_refused(module):
    tensors = to_state_dict(SMALL, random_params(SMALL))
    name = f"transformer_blocks.1.norm1.emb.{module}"
    with pytest.raises(ValueError, match=f"found {name} unlike those of block 0 in here, expected one embedder"):
        from_state_dict(SMALL, tensors | {name: tensors[name] + 0.1}, "here")
    tensors.pop(name)
    with pytest.raises(ValueError, match=f"missing: {name}"):
        from_state_dict(SMALL, tensors, "here")


@pytest.mark.parametrize("change", [lambda x: x + 0.1, lambda x: np.roll(x, 8, axis=2), lambda x: x[:, :7], np.ravel])
def test_other_positions_are_refused(change):
    tensors = to_state_dict(SMALL, random_params(SMALL))
    positions = change(column_row_positions(4, 4, 16)[None])
    with pytest.raises(ValueError, match=r"found pos_embed\.pos_embed .* not sin-cos of column and row"):
        from_state_dict(SMALL, tensors | {"pos_embed.pos_embed": positions}, "here")


@pytest.mark.parity
@pytest.mark.parametrize("model", [SMALL, ODD], ids=["small", "odd"])
def test_outputs_are_those_of_diffusers(model):
    """At level 0 as it is; at other levels with the authors' frequencies, which diffusers changed (see `interop.dit`)."""
    torch = pytest.importorskip("torch")
    twin = theirs(model).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.copy_(torch.randn_like(tensor) / math.sqrt(tensor[0].numel() if tensor.ndim > 1 else 4))
    embedder = twin.transformer_blocks[0].norm1.emb
    for block in twin.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(embedder.state_dict())
    state = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    params = from_state_dict(model, state, "diffusers")

    side = 4 * model.patch
    image = np.random.default_rng(1).standard_normal((3, side, side, model.channels)).astype(np.float32)
    label = np.asarray([0, 1, model.num_classes])
    run = jax.jit(lambda level: model.apply({"params": params}, image, level[:, None] / model.level_scale, label))
    for shift, steps in ((1, (0.0, 0.0, 0.0)), (0, (999.0, 250.0, 7.0))):
        for block in twin.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
        with torch.no_grad():
            inputs = torch.from_numpy(image).permute(0, 3, 1, 2), torch.tensor(steps), torch.from_numpy(label)
            expected = twin(*inputs).sample.permute(0, 2, 3, 1).numpy()
        found = run(jnp.asarray(steps))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        print(f"\nsteps {steps}: relative {error:.1e}, largest {np.abs(expected).max():.2f}")
        assert error <= 1e-5

    again = to_state_dict(model, params)
    assert set(again) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor)
    twin.load_state_dict({name: torch.tensor(tensor) for name, tensor in again.items()}, strict=True)


@pytest.mark.parity
def test_the_public_model_has_diffusers_names_and_shapes():
    torch = pytest.importorskip("torch")
    model = DiT(**PUBLIC_DIT)
    with torch.device("meta"):
        twin = theirs(model, sample_size=32)
    found = jax.eval_shape(lambda params: to_state_dict(model, params), abstract_params(model))
    expected = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert len(expected) == 28 * (14 + 4 + 1) + 6
