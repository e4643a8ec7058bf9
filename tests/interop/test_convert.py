"""The converter on small models under the public files' names. absl's flags are global: it runs in processes of its own."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from small_public import (
    CLASSES,
    JSON,
    MODELS,
    STAGES,
    VQGAN,
    WEIGHTS,
    converted,
    random_like,
    sources,
    start,
    write_json,
)

from configs import wuerstchen as configs
from fid_imagegen import tasks
from fid_imagegen.interop import efficientnet, paella_vq, public_wuerstchen, wuerstchen
from fid_imagegen.interop.safetensors_io import load_tree
from fid_imagegen.models.wuerstchen.compressor import build_compressor
from fid_imagegen.pipelines import WuerstchenPipeline

SIZE = {"height": 128, "width": 256}
QUICK = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "progress": False, **SIZE}


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
    assert pipe.latents(["a red star"], size=(128, 256), steps=1).shape == (1, 3, 6, 16)
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
