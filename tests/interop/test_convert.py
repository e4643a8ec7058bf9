"""The converter on small models under the public files' names. absl's flags are global: it runs in processes of its own."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from configs import wuerstchen as configs
from fid_imagegen import tasks
from fid_imagegen.data.tokenizer import byte_characters
from fid_imagegen.interop import efficientnet, paella_vq, public_wuerstchen, wuerstchen
from fid_imagegen.interop.clip import clip_state_dict
from fid_imagegen.interop.safetensors_io import load_tree
from fid_imagegen.models.text.clip import TOWERS, CLIPTextEncoder
from fid_imagegen.models.wuerstchen.compressor import build_compressor
from fid_imagegen.models.wuerstchen.stage_a import PaellaVQ
from fid_imagegen.models.wuerstchen.stage_b import StageB
from fid_imagegen.models.wuerstchen.stage_c import StageC
from fid_imagegen.pipelines import WuerstchenPipeline

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = public_wuerstchen.WEIGHTS
VOCABULARY = 514  # CLIP's without a merge: 256 bytes, inside a word and at its end; start and end
COMMON = {"vocabulary": VOCABULARY, "length": 77, "activation": "gelu", "end": VOCABULARY - 1}
SMALL_TOWERS = {
    "H": {"width": 12, "layers": 2, "heads": 3, "hidden": 20, **COMMON},
    "bigG": {"width": 16, "layers": 1, "heads": 4, "hidden": 24, **COMMON},
}
VQGAN = {
    "in_channels": 3,
    "out_channels": 3,
    "up_down_scale_factor": 2,
    "levels": 2,
    "bottleneck_blocks": 1,
    "embed_dim": 12,
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "scale_factor": 0.5,
}
DECODER = {
    "c_in": 4,
    "c_out": 4,
    "c_r": 8,
    "patch_size": 2,
    "c_cond": 16,
    "c_hidden": [8, 12, 16],
    "nhead": [-1, 3, 4],
    "blocks": [1, 1, 2],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "effnet_embd": 16,
    "clip_embd": 12,
    "kernel_size": 3,
    "dropout": 0.1,
}
PRIOR = {"c_in": 16, "c": 24, "c_cond": 16, "c_r": 8, "depth": 2, "nhead": 3, "dropout": 0.1}
JSON = {"vqgan": VQGAN, "decoder": DECODER, "prior": PRIOR}
CLASSES = {"vqgan": "PaellaVQModel", "decoder": "WuerstchenDiffNeXt", "prior": "WuerstchenPrior"}
WHERE = {"vqgan": "decoder/vqgan", "decoder": "decoder/decoder", "prior": "prior/prior"}
MODELS = {
    "vqgan": PaellaVQ(levels=(6, 12), bottleneck_blocks=1, codebook_size=16),
    "decoder": StageB(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in DECODER.items() if k != "c_out"}, text=True
    ),
    "prior": StageC(**PRIOR),
}
STAGES = {"vqgan": "stage_a", "decoder": "stage_b", "prior": "stage_c"}
# The published precision is bfloat16, in which nothing could be compared.
FLOAT32 = """
from configs import wuerstchen

def get_config(arg):
    config = wuerstchen.base()
    wuerstchen.published(config)
    for stage in ("stage_b", "stage_c"):
        config[stage].model.dtype = "float32"
    return config
"""
ENTRY = """
import json, sys
from fid_imagegen import command, convert
assert not {"jax", "numpy", "torch"} & set(sys.modules)
from fid_imagegen.models.text.clip import TOWERS
TOWERS.update(json.loads(sys.argv.pop(1)))
command.run(convert.main)
"""
SIZE = {"height": 128, "width": 256}
QUICK = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "progress": False, **SIZE}


def random_like(shapes, seed):
    """Weights about as large as trained ones; none at zero, variances positive, PyTorch's counters as they are."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (shape, dtype) in sorted(shapes.items()):
        if dtype == np.int64:
            tensors[name] = np.zeros(shape, dtype)
            continue
        fan_in = math.prod(shape[1:]) if name.endswith("weight") and len(shape) > 1 else 10
        # Noise estimates are about x, as a trained model's are at high levels: (x - a) / |1 - b| with b at 0 in Stage C,
        # (x - a) / b with b at 1 in Stage B. Others grow from step to step, and rounding errors with them. Nor are images far
        # outside [0, 1], where they are cut.
        scale = (0.1 if name.startswith(("out.1.", "clf.1.", "out_block.0.")) else 1) / np.sqrt(fan_in)
        x = scale * rng.standard_normal(shape)
        x = x + 0.5 if name == "out_block.0.bias" else x
        if name == "clf.1.bias":
            x[len(x) // 2 :] += 4
        tensors[name] = (np.abs(x) + 0.5 if name.endswith("running_var") else x).astype(np.float32)
    return tensors


def shapes_of(part):
    model = MODELS[part]
    if part != "vqgan":
        return {name: (shape, np.float32) for name, shape in wuerstchen.torch_shapes(model).items()}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), variables)
    return {k: (x.shape, x.dtype) for k, x in paella_vq.to_state_dict(model, zeros, authors=False).items()}


def tower_tensors(name, seed):
    encoder = CLIPTextEncoder(**SMALL_TOWERS[name])
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    return random_like({k: (x.shape, x.dtype) for k, x in clip_state_dict(zeros).items()}, seed)


def tower_json(name):
    tower = SMALL_TOWERS[name]
    return {
        "hidden_size": tower["width"],
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
        "intermediate_size": tower["hidden"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 2,
        "pad_token_id": VOCABULARY - 1,
    }


def write_tokenizer(folder):
    folder.mkdir(parents=True)
    characters = byte_characters()
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


@pytest.fixture(scope="module")
def tensors():
    return {part: random_like(shapes_of(part), seed) for seed, part in enumerate(MODELS)}


@pytest.fixture(scope="module")
def public(tmp_path_factory, tensors):
    """ROOT/{decoder,prior}, laid out as the two repositories; ROOT/config.py."""
    root = tmp_path_factory.mktemp("public")
    for part, where in WHERE.items():
        write_json(root / where / "config.json", JSON[part] | {"_class_name": CLASSES[part]})
        safetensors.numpy.save_file(tensors[part], root / where / WEIGHTS)
    for repository, tower in (("decoder", "H"), ("prior", "bigG")):
        folder = root / repository / "text_encoder"
        write_json(folder / "config.json", tower_json(tower))
        safetensors.numpy.save_file(tower_tensors(tower, 7), folder / "model.safetensors")
        write_tokenizer(root / repository / "tokenizer")
    (root / "config.py").write_text(FLOAT32, "utf-8")
    return root


def start(*arguments):
    command = [sys.executable, "-c", ENTRY, json.dumps(SMALL_TOWERS), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def converted(out, *arguments):
    done = start(f"--out={out}", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"converted: {out}\n"
    return out


def sources(root):
    return f"--decoder={root / 'decoder'}", f"--prior={root / 'prior'}", f"--config={root / 'config.py'}"


@pytest.fixture(scope="module")
def out(public, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("converted") / "model", *sources(public))


@pytest.fixture
def towers(monkeypatch):
    for name, tower in SMALL_TOWERS.items():
        monkeypatch.setitem(TOWERS, name, tower)


def small_configs():
    return configs.get_config("published")


def test_the_public_repositories_become_our_stages(out, tensors, towers):
    files = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert files == {
        "stage_a/config.json",
        "stage_a/model.safetensors",
        *(
            f"{stage}/{name}"
            for stage in ("stage_b", "stage_c")
            for name in ("config.json", "model.safetensors", "text.safetensors", "tokenizer.json")
        ),
    }
    for part, stage in STAGES.items():
        groups, _ = load_tree(out / stage / "model.safetensors")
        name = "vqgan" if part == "vqgan" else stage
        assert set(groups) == ({"vqgan", "vqgan_stats"} if part == "vqgan" else {stage})
        if part == "vqgan":
            found = paella_vq.from_state_dict(MODELS[part], tensors[part], "the test")
            jax.tree.map(np.testing.assert_array_equal, groups["vqgan_stats"]["batch_stats"], found["batch_stats"])
            found = found["params"]
        else:
            found = wuerstchen.from_state_dict(MODELS[part], tensors[part], "the test")
        jax.tree.map(np.testing.assert_array_equal, groups[name], found)


def test_the_pipeline_samples_the_same_image_from_the_same_weights(out, tensors, towers, tmp_path):
    moved = shutil.copytree(out, tmp_path / "moved")  # a model's files name no place outside it
    pipe = WuerstchenPipeline.from_pretrained(moved)
    assert pipe.step == 128 and pipe.stage_b.task.stride * 3 == 128  # 24 x 24 latents for 1024 pixels
    config = pipe.stage_c.config
    assert (config.data.image_size, config.form, config.latent_scale) == (768, "eps_ab", "published")
    assert (pipe.stage_b.config.data.image_size, pipe.stage_b.config.latent_scale) == (1024, 0.5)
    assert "compressor" not in pipe.stage_b.groups
    image = pipe("a red star", seed=3, **QUICK)
    assert image.shape == (1, 128, 256, 3) and image.std() > 1

    reference = WuerstchenPipeline.from_pretrained(out)
    for part, stage in (("decoder", reference.stage_b), ("prior", reference.stage_c)):
        stage.groups[STAGES[part]] = wuerstchen.from_state_dict(MODELS[part], tensors[part], "the test")
    variables = paella_vq.from_state_dict(MODELS["vqgan"], tensors["vqgan"], "the test")
    reference.stage_b.groups |= {"vqgan": variables["params"]}
    np.testing.assert_array_equal(image, reference("a red star", seed=3, **QUICK))
    assert not np.array_equal(image, pipe("a blue circle", seed=3, **QUICK))


def test_statistics_need_a_compressor(out, towers, tmp_path):
    moved = shutil.copytree(out, tmp_path / "moved")
    config = json.loads((moved / "stage_c" / "config.json").read_text())
    write_json(moved / "stage_c" / "config.json", config | {"latent_scale": "statistics"})
    with pytest.raises(ValueError, match="found no statistics of a compressor in stage_b, expected.*--compressor"):
        WuerstchenPipeline.from_pretrained(moved)


def test_back_to_diffusers_names_bit_for_bit(out, tensors, tmp_path):
    back = converted(tmp_path / "back", "--to=diffusers", f"--model={out}")
    for part in MODELS:
        found = safetensors.numpy.load_file(back / part / WEIGHTS)
        assert set(found) == set(tensors[part])
        for name, tensor in tensors[part].items():
            assert found[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found[name], tensor, err_msg=f"{part} {name}")
        config = json.loads((back / part / "config.json").read_text())
        assert config == JSON[part] | {"_class_name": CLASSES[part]}


def test_the_compressor_comes_along_for_training(public, towers, tmp_path):
    model = build_compressor("efficientnet_v2_s", channels=16)
    zeros = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), zeros)
    theirs = random_like({k: (x.shape, x.dtype) for k, x in efficientnet.to_state_dict(model, zeros).items()}, 5)
    safetensors.numpy.save_file(theirs, tmp_path / "effnet.safetensors")
    files = public_wuerstchen.diffusers_files(public / "decoder", public / "prior", tmp_path / "effnet.safetensors")
    stage = public_wuerstchen.public_stages(files, small_configs())["stage_b"]()
    variables = {"params": stage.groups["compressor"], "batch_stats": stage.groups["compressor_stats"]["batch_stats"]}
    for name, tensor in efficientnet.to_state_dict(model, variables).items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    # What Stage C is fine-tuned on finds there all that it freezes; both scales are the published one.
    task = tasks.build(small_configs().stage_c)
    task.text.frozen = dict
    frozen = {name: flatten_dict(tree) for name, tree in task.frozen().items()}
    assert {name: set(flatten_dict(stage.groups[name])) for name in frozen} == {k: set(v) for k, v in frozen.items()}
    moments = stage.groups["compressor_stats"]["latents"]
    assert (moments["mean"] == -1).all() and (np.sqrt(moments["variance"]) == 42).all()


def changed(public, tmp_path):
    return shutil.copytree(public, tmp_path / "copy")


def read(root):
    """All three stages of the two repositories."""
    files = public_wuerstchen.diffusers_files(root / "decoder", root / "prior")
    return [make() for make in public_wuerstchen.public_stages(files, small_configs()).values()]


def test_everything_that_is_missing_is_listed(public, towers, tmp_path):
    root = changed(public, tmp_path)
    for name in ("decoder/vqgan/config.json", f"prior/prior/{WEIGHTS}", "prior/text_encoder/config.json"):
        (root / name).unlink()
    with pytest.raises(FileNotFoundError, match="expected local copies of warp-ai/wuerstchen") as error:
        read(root)
    for name in ("vqgan/config.json", f"prior/prior/{WEIGHTS}", "prior/text_encoder/config.json"):
        assert name in str(error.value)
    assert "decoder/decoder" not in str(error.value)
    shutil.rmtree(root / "decoder" / "tokenizer")
    root = changed(public, tmp_path / "again")
    (root / "decoder" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no .*merges.txt, expected tokenizer.json"):
        read(root)
    with pytest.raises(FileNotFoundError, match=r"found no .*vqgan_f4_v1_500k.pt, .*model_v3_stage_c.pt"):
        public_wuerstchen.authors_files(tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "prior/prior",
            {"_class_name": "StableCascadeUNet"},
            r"found a StableCascadeUNet in .*: Stable Cascade \(v3\)",
        ),
        ("prior/prior", {"depth": 3}, "found tensors that do not fit in .*missing: blocks.8"),
        ("prior/prior", {"c_cond": 13}, "found a network that reads text of width 13, expected one of .12, 16"),
        ("prior/prior", {"c_in": 8}, "found a decoder of 4 latent and 16 compressor channels, expected 4 .* and 8"),
        ("decoder/decoder", {"clip_embd": 16}, "found width 12 for 16.*in .*text_encoder/config.json|do not fit"),
        ("decoder/vqgan", {"in_channels": 1}, "found in_channels 1 and out_channels 3"),
        ("decoder/vqgan", {"levels": 1}, "found tensors that do not fit in .*vqgan"),
        ("decoder/text_encoder", {"num_attention_heads": 4}, "found heads 4 for 3 in .*text_encoder/config.json"),
    ],
)
def test_files_of_another_model_are_named(public, towers, tmp_path, file, change, message):
    root = changed(public, tmp_path)
    path = root / file / "config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        read(root)


def test_damaged_and_foreign_files_are_named(public, towers, tmp_path):
    root = changed(public, tmp_path)
    path = root / "prior" / "prior" / "config.json"
    fields = json.loads(path.read_text())
    write_json(path, {k: v for k, v in fields.items() if k != "nhead"})
    with pytest.raises(ValueError, match=r"found no nhead in .*prior/config.json"):
        read(root)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"found .*prior/config.json unreadable"):
        read(root)
    write_json(path, fields)
    vqgan = {name: value for name, value in VQGAN.items() if name != "scale_factor"}
    write_json(root / "decoder" / "vqgan" / "config.json", vqgan)
    with pytest.raises(ValueError, match=r"found no scale_factor in .*vqgan/config.json"):
        read(root)
    write_json(root / "decoder" / "vqgan" / "config.json", VQGAN)
    weights = {"clip_txt_mapper.weight": np.zeros(1)}
    safetensors.numpy.save_file(weights, root / "prior" / "prior" / WEIGHTS)
    with pytest.raises(ValueError, match="found 'clip_txt_mapper.weight' in .*: weights of Stable Cascade"):
        read(root)
    safetensors.numpy.save_file({"byt5_mapper.weight": np.zeros(1)}, root / "decoder" / "decoder" / WEIGHTS)
    with pytest.raises(ValueError, match="weights of the discrete Stage B of Würstchen v1"):
        read(root)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("stage_c", {"form": "v"}, "found config.stage_c.form 'v', expected"),
        ("stage_c", {"latent_scale": "statistics"}, "found config.stage_c.latent_scale 'statistics'"),
        ("stage_c", {"model.network": "transformer"}, "found config.stage_c.model.network 'transformer'"),
        ("stage_b", {"text.encoder": "none"}, "found config.stage_b.text.encoder 'none'"),
        (
            "stage_a",
            {"model.levels": (6, 10)},
            r"found a Stage A of levels \(6, 10\) for 3 channels, expected \(5, 10\)",
        ),
    ],
)
def test_what_diffusers_cannot_express_is_refused(stage, change, message):
    config = configs.base()
    configs.published(config)
    config[stage].update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        public_wuerstchen.diffusers_model(stage, config, {})


def test_nothing_half_written_and_nothing_overwritten(public, out, tmp_path):
    root = changed(public, tmp_path)
    safetensors.numpy.save_file({"projection.weight": np.zeros(1)}, root / "prior" / "prior" / WEIGHTS)
    done = start(f"--out={tmp_path / 'made'}", *sources(root))  # the last stage fails
    assert done.returncode == 1 and done.stderr.startswith("error: found tensors that do not fit in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    done = start(f"--out={out}", *sources(public))
    assert done.returncode == 1 and "expected a folder that does not exist" in done.stderr
    done = start(f"--out={tmp_path / 'made'}", f"--model={out}")
    assert done.returncode == 1 and "found --model with --to=stages, expected --decoder and" in done.stderr


# ---- against diffusers and transformers


def twins():
    """diffusers' and transformers' small models, every tensor random, by folder of the two repositories."""
    import torch
    import transformers
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

    clip = {name: transformers.CLIPTextConfig(**tower_json(name)) for name in SMALL_TOWERS}
    models = {
        "decoder/vqgan": PaellaVQModel(**VQGAN),
        "decoder/decoder": WuerstchenDiffNeXt(**DECODER),
        "decoder/text_encoder": transformers.CLIPTextModel(clip["H"]),
        "prior/prior": WuerstchenPrior(**PRIOR),
        "prior/text_encoder": transformers.CLIPTextModel(clip["bigG"]),
    }
    for seed, model in enumerate(models.values()):
        state = model.state_dict()
        shapes = {name: (tuple(x.shape), np.float32) for name, x in state.items() if x.is_floating_point()}
        drawn = {name: torch.from_numpy(x) for name, x in random_like(shapes, 10 + seed).items()}
        model.load_state_dict(state | drawn)
        model.eval()
    return models


def torch_images(models, tokenize, prompt, starts, noises, scales, monkeypatch, dtype):
    """(compressor latents, Stage A's latents, images), channels last: the two pipelines of diffusers, written as loops.

    starts, noises: of the prior and of the decoder, [B, H, W, C] and one a step. `scales`: guidance of each.
    """
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddpm_wuerstchen

    to_torch = lambda x: torch.from_numpy(np.array(x)).movedim(-1, 1).to(dtype)  # noqa: E731
    models = {name: model.to(dtype) for name, model in models.items()}

    def text(name):
        numbers, mask = (torch.from_numpy(x).long() for x in tokenize([prompt, ""]))
        return models[name](numbers, attention_mask=mask).last_hidden_state

    def loop(predict, x, noise, scale):
        drawn = iter(noise)
        monkeypatch.setattr(scheduling_ddpm_wuerstchen, "randn_tensor", lambda *a, **k: to_torch(next(drawn)))
        scheduler = diffusers.DDPMWuerstchenScheduler()
        scheduler.set_timesteps(len(noise))
        for t in scheduler.timesteps[:-1]:
            with_text, without = predict(torch.cat([x, x]), t.expand(2).to(dtype)).chunk(2)
            guided = torch.lerp(without, with_text, scale)
            x = scheduler.step(guided, t.expand(1).to(dtype), x).prev_sample
        return x

    with torch.no_grad():
        states = text("prior/text_encoder")
        prior = loop(lambda x, r: models["prior/prior"](x, r, states), to_torch(starts[0]), noises[0], scales[0])
        latents = 42.0 * prior - 1.0
        effnet, states = torch.cat([latents, torch.zeros_like(latents)]), text("decoder/text_encoder")
        decode = lambda x, r: models["decoder/decoder"](x, r, effnet, states)  # noqa: E731
        made = loop(decode, to_torch(starts[1]), noises[1], scales[1])
        images = models["decoder/vqgan"].decode(VQGAN["scale_factor"] * made).sample.clamp(0, 1)
    return [x.movedim(1, -1).double().numpy() for x in (latents, made, images)]


@pytest.mark.parity
def test_sampling_follows_diffusers(towers, tmp_path, monkeypatch):
    """What save_pretrained wrote, converted and sampled from text to image, against the same models in torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    models = twins()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for repository in ("decoder", "prior"):
        write_tokenizer(tmp_path / repository / "tokenizer")
    (tmp_path / "config.py").write_text(FLOAT32, "utf-8")
    pipe = WuerstchenPipeline.from_pretrained(converted(tmp_path / "model", *sources(tmp_path)))

    prompt, size, steps, scales, key = "a red star", (128, 256), (6, 4), (3.0, 2.0), jax.random.key(5)
    index, nothing = jnp.arange(1), lambda count: None
    latents = pipe._prior([prompt], None, size, key, index, steps[0], scales[0], nothing)
    made = pipe._decoder([prompt], latents, size, key, index, steps[1], scales[1], nothing)
    found = (latents, made, pipe._to_images(pipe.stage_b.groups, made))
    assert [x.shape for x in found] == [(1, 3, 6, 16), (1, 32, 64, 4), (1, 128, 256, 3)]

    sides = ((pipe.stage_c, key, (3, 6, 16)), (pipe.stage_b, jax.random.fold_in(key, 1), (32, 64, 4)))
    draws = [stage.task.denoiser.noise(key, index, shape) for stage, key, shape in sides]
    starts = [draw(0) for draw in draws]
    noises = [[draw(i) for i in range(1, count + 1)] for draw, count in zip(draws, steps, strict=True)]
    run = lambda dtype: torch_images(  # noqa: E731
        models, pipe.stage_c.tokenizer, prompt, starts, noises, scales, monkeypatch, dtype
    )
    theirs, wide = run(torch.float32), run(torch.float64)
    gap = lambda x, y: np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()  # noqa: E731
    for name, ours, single, double in zip(("compressor", "latents", "images"), found, theirs, wide, strict=True):
        print(
            f"\n{name}, deviation {np.std(single):.2f}: ours to torch fp32 {gap(ours, single):.1e}, "
            f"to fp64 {gap(ours, double):.1e}, torch fp32 to fp64 {gap(single, double):.1e}"
        )
        assert np.std(single) > 0.01 and gap(ours, single) <= 1e-4

    # And back: diffusers loads what we write, all of it, and it is what it was.
    back = converted(tmp_path / "back", "--to=diffusers", f"--model={tmp_path / 'model'}")
    for name in ("decoder/vqgan", "decoder/decoder", "prior/prior"):
        model = models[name].float()
        loaded, report = type(model).from_pretrained(back / name.split("/")[1], output_loading_info=True)
        assert not any(report.values()), report
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
        for tensor, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[tensor]), tensor


@pytest.mark.parity
def test_the_authors_files_are_the_same_model(public, out, tensors, tmp_path):
    """Three .pt files, as they lie in several state dicts, and one folder with tower and tokenizer for each CLIP."""
    torch = pytest.importorskip("torch")
    pack = lambda tensors: {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}  # noqa: E731
    model = build_compressor("efficientnet_v2_s", channels=16)
    zeros = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), zeros)
    joined = {part: wuerstchen.join_projections(tensors[part]) for part in ("decoder", "prior")}
    vqgan = dict(tensors["vqgan"])
    vqgan[paella_vq.AUTHORS_CODEBOOK] = vqgan.pop(paella_vq.CODEBOOK)
    torch.save({"state_dict": pack(vqgan)}, tmp_path / "vqgan_f4_v1_500k.pt")
    effnet = pack(efficientnet.to_state_dict(model, zeros))
    torch.save({"state_dict": pack(joined["decoder"]), "effnet_state_dict": effnet}, tmp_path / "model_v2_stage_b.pt")
    torch.save({"state_dict": {}, "ema_state_dict": pack(joined["prior"])}, tmp_path / "model_v3_stage_c.pt")
    for repository in ("decoder", "prior"):
        shutil.copytree(public / repository / "text_encoder", tmp_path / repository)
        shutil.copytree(public / repository / "tokenizer", tmp_path / repository, dirs_exist_ok=True)
    # No config.json lies beside a .pt: sizes are the given config's.
    sizes = {stage: json.loads((out / stage / "config.json").read_text()) for stage in STAGES.values()}
    (tmp_path / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n\ndef get_config(arg):\n"
        f"    return ConfigDict(json.loads({json.dumps(json.dumps(sizes))}))\n",
        "utf-8",
    )
    clips = (f"--decoder_clip={tmp_path / 'decoder'}", f"--prior_clip={tmp_path / 'prior'}")
    made = converted(tmp_path / "made", f"--authors={tmp_path}", *clips, f"--config={tmp_path / 'config.py'}")
    for stage in STAGES.values():
        groups, _ = load_tree(made / stage / "model.safetensors")
        expected, _ = load_tree(out / stage / "model.safetensors")
        if stage == "stage_b":
            assert set(groups) - set(expected) == {"compressor", "compressor_stats"}
        jax.tree.map(np.testing.assert_array_equal, {name: groups[name] for name in expected}, expected)
        assert json.loads((made / stage / "config.json").read_text()) == sizes[stage]
