import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.clip import check_config, clip_state_dict, load_clip, save_clip
from fid_imagegen.models.text.clip import BIG_G, CLIPTextEncoder, H

ODD = {"width": 12, "layers": 3, "heads": 3, "hidden": 20, "vocabulary": 50, "length": 9}
ENCODER = CLIPTextEncoder(**ODD, activation="gelu", end=49)
CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 50,
    "max_position_embeddings": 9,
    "hidden_act": "gelu",
    "eos_token_id": 49,
}


def public_shapes(width, layers, hidden, vocabulary, length, projection=None, **_):
    """Every tensor of Hugging Face's CLIPTextModel, written out."""
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(layers):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{layer}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
        dense = {f"self_attn.{name}_proj": (width, width) for name in "qkv"} | {"self_attn.out_proj": (width, width)}
        for name, shape in (dense | {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}).items():
            shapes |= {f"encoder.layers.{layer}.{name}.weight": shape}
            shapes |= {f"encoder.layers.{layer}.{name}.bias": shape[:1]}
    shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    return shapes | ({"text_projection.weight": (projection, width)} if projection else {})


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in public_shapes(**ODD).items()}


@pytest.fixture
def save(tmp_path):
    def write(tensors, name="model.safetensors"):
        safetensors.numpy.save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("preset", "projection", "entries"), [(H, None, 388), (BIG_G, None, 516), (BIG_G, 1280, 517)])
def test_full_size_names_and_shapes(preset, projection, entries):
    encoder = CLIPTextEncoder(**preset, projection=projection)
    tokens = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    params = jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]
    found = {name: x.shape for name, x in jax.eval_shape(clip_state_dict, params).items()}
    assert found == public_shapes(**preset, projection=projection) and len(found) == entries


def test_every_tensor_lands_in_its_place_and_goes_back(tensors, save, tmp_path):
    params = load_clip(save(tensors), ENCODER)
    blocks = params["transformer"]["blocks"]
    for layer in range(3):
        name = f"text_model.encoder.layers.{layer}"
        np.testing.assert_array_equal(blocks["query"]["kernel"][layer], tensors[f"{name}.self_attn.q_proj.weight"].T)
        np.testing.assert_array_equal(blocks["down"]["kernel"][layer], tensors[f"{name}.mlp.fc2.weight"].T)
        np.testing.assert_array_equal(blocks["norm_mlp"]["scale"][layer], tensors[f"{name}.layer_norm2.weight"])
    for name, tensor in clip_state_dict(params).items():
        np.testing.assert_array_equal(tensor, tensors.pop(name), err_msg=name)
    assert not tensors
    save_clip(tmp_path / "back.safetensors", params)
    assert_same(load_clip(tmp_path / "back.safetensors", ENCODER), params)
    out = jax.eval_shape(ENCODER.apply, {"params": params}, jnp.zeros((1, 9), jnp.int32))
    assert out["tokens"].shape == (1, 9, 12)


def test_the_forms_that_public_files_take(tensors, save):
    expected = load_clip(save(tensors), ENCODER)
    bare = {name.removeprefix("text_model."): x for name, x in tensors.items()}
    position_ids = np.arange(9)[None]
    image_side = {"vision_model.post_layernorm.weight": np.ones(3, np.float32), "logit_scale": np.ones((), np.float32)}
    image_side["visual_projection.weight"] = np.ones((2, 3), np.float32)
    for form in (
        tensors | {"text_model.embeddings.position_ids": position_ids},
        bare,
        bare | {"embeddings.position_ids": position_ids},
        tensors | image_side | {"text_projection.weight": np.ones((5, 12), np.float32)},
    ):
        assert_same(load_clip(save(form), ENCODER), expected)


def test_projection_is_kept_only_by_an_encoder_with_one(tensors, save):
    projection = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    file = save(tensors | {"text_projection.weight": projection})
    assert "projection" not in load_clip(file, ENCODER)
    params = load_clip(file, ENCODER.clone(projection=5))
    np.testing.assert_array_equal(params["projection"]["kernel"], projection.T)
    np.testing.assert_array_equal(clip_state_dict(params)["text_projection.weight"], projection)
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight"):
        load_clip(save(tensors), ENCODER.clone(projection=5))


def test_a_folder_of_one_file_or_of_shards(tensors, save, tmp_path):
    expected = load_clip(save(tensors), ENCODER)
    assert_same(load_clip(tmp_path, ENCODER), expected)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*model\.safetensors\.index\.json with its shards"):
        load_clip(tmp_path, ENCODER)
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {name: shards[number % 2] for number, name in enumerate(names)}
    for shard in shards:
        save({name: tensors[name] for name in names if index[name] == shard}, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same(load_clip(tmp_path, ENCODER), expected)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        load_clip(tmp_path, ENCODER)


def test_what_does_not_fit_is_listed(tensors, save):
    del tensors["text_model.encoder.layers.1.mlp.fc1.bias"]
    tensors["text_model.encoder.layers.3.mlp.fc1.bias"] = np.zeros(20, np.float32)
    tensors["text_model.final_layer_norm.bias"] = np.zeros(13, np.float32)
    with pytest.raises(ValueError, match="tensors that do not fit") as error:
        load_clip(save(tensors), ENCODER)
    for line in (
        "missing: text_model.encoder.layers.1.mlp.fc1.bias",
        "extra: text_model.encoder.layers.3.mlp.fc1.bias",
    ):
        assert line in str(error.value)
    assert "text_model.final_layer_norm.bias (13,)" in str(error.value)


def test_config_of_another_tower_is_refused(tensors, save, tmp_path):
    """Heads and activation are not in the weights."""
    save(tensors)

    def load(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_clip(tmp_path, ENCODER)

    for fine in (CONFIG, {"text_config": CONFIG}, CONFIG | {"eos_token_id": 2}):
        load(fine)
    with pytest.raises(ValueError, match=r"found heads 4 for 3, activation 'quick_gelu' for 'gelu' in .*config\.json"):
        load(CONFIG | {"num_attention_heads": 4, "hidden_act": "quick_gelu"})
    with pytest.raises(ValueError, match="epsilon 1e-06 for 1e-05, end 48 for 49"):
        load(CONFIG | {"layer_norm_eps": 1e-6, "eos_token_id": 48})
    # What a nested config leaves out is Hugging Face's default, OpenAI's base tower.
    base = CLIPTextEncoder(512, 12, 8, 2048, 49408, 77, "quick_gelu", 49407)
    check_config({"text_config": {}}, base, "here")


CASES = {
    "small": {"width": 16, "layers": 2, "heads": 2, "hidden": 64, "vocabulary": 64, "length": 16, "activation": "gelu"},
    "odd": ODD | {"activation": "quick_gelu"},
    "one head, one layer": ODD | {"layers": 1, "heads": 1, "activation": "gelu"},
}


@pytest.mark.parity
@pytest.mark.parametrize("end", [None, 2])  # 2: the old configs, which pool at the highest number
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, end, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = CASES[case]
    last = fields["vocabulary"] - 1
    config = transformers.CLIPTextConfig(
        hidden_size=fields["width"],
        num_hidden_layers=fields["layers"],
        num_attention_heads=fields["heads"],
        intermediate_size=fields["hidden"],
        vocab_size=fields["vocabulary"],
        max_position_embeddings=fields["length"],
        hidden_act=fields["activation"],
        projection_dim=7,
        eos_token_id=end or last,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.3, parameter.shape)))
    encoder = CLIPTextEncoder(**fields, end=last, projection=7)
    model.save_pretrained(tmp_path / "whole")
    params = load_clip(tmp_path / "whole", encoder)
    model.text_model.save_pretrained(tmp_path / "tower")
    tower = load_clip(tmp_path / "tower", encoder.clone(projection=None))
    assert_same(tower["transformer"], params["transformer"])

    length = fields["length"]
    tokens = rng.integers(3, last, (5, length))
    ends = np.asarray([2, length - 1, 5, 3, 4])
    tokens[np.arange(length) >= ends[:, None]] = last  # padded by the end token, as the public tokenizers do
    right = np.arange(length) <= ends[:, None]
    holes = right & (rng.random(right.shape) < 0.7)
    holes[:, 0] = True
    apply = jax.jit(encoder.apply)
    for mask in (None, right, holes):
        with torch.no_grad():
            given = None if mask is None else torch.from_numpy(mask.astype(np.int64))
            theirs = model(torch.from_numpy(tokens), attention_mask=given)
            pooled = model.text_model(torch.from_numpy(tokens), attention_mask=given).pooler_output
        ours = apply({"params": params}, tokens.astype(np.int32), mask)
        pairs = {"tokens": theirs.last_hidden_state, "pooled": pooled, "projected": theirs.text_embeds}
        for name, expected in pairs.items():
            error = np.abs(np.asarray(ours[name]) - expected.numpy()).max() / np.abs(expected.numpy()).max()
            print(f"{case} end={end} mask={mask is not None} {name}: {error:.1e}")
            assert error <= 1e-5

    # And back: both classes load what we write.
    (tmp_path / "back").mkdir()
    save_clip(tmp_path / "back" / "model.safetensors", params)
    for cls, folder in (("CLIPTextModelWithProjection", "whole"), ("CLIPTextModel", "tower")):
        (tmp_path / "back" / "config.json").write_text((tmp_path / folder / "config.json").read_text())
        loaded, report = getattr(transformers, cls).from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        original = model if cls.endswith("Projection") else model.text_model
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parity
@pytest.mark.parametrize(("preset", "projection"), [(H, 1024), (BIG_G, 1280)])
def test_full_size_equals_transformers(preset, projection):
    """Names, shapes and count of the real classes, on torch's meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.CLIPTextConfig(
            hidden_size=preset["width"],
            num_hidden_layers=preset["layers"],
            num_attention_heads=preset["heads"],
            intermediate_size=preset["hidden"],
            projection_dim=projection,
        )
        model = transformers.CLIPTextModelWithProjection(config)
    theirs = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    tokens = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    encoder = CLIPTextEncoder(**preset, projection=projection)
    params = jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]
    assert {name: x.shape for name, x in jax.eval_shape(clip_state_dict, params).items()} == theirs
    assert sum(p.numel() for p in model.text_model.parameters()) in (352_984_064, 693_021_440)
