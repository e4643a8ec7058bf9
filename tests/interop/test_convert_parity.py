"""The converter against diffusers and transformers: whole sampling, and the authors' own files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_public import (
    DECODER,
    FLOAT32,
    PRIOR,
    SMALL_TOWERS,
    STAGES,
    VQGAN,
    converted,
    random_like,
    sources,
    tower_json,
    write_tokenizer,
)

from fid_imagegen.interop import efficientnet, paella_vq, wuerstchen
from fid_imagegen.interop.safetensors_io import load_tree
from fid_imagegen.models.wuerstchen.compressor import build_compressor
from fid_imagegen.pipelines import WuerstchenPipeline


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

    prompt, size, steps, scales, seed = "a red star", (128, 256), (6, 4), (3.0, 2.0), 5
    index, key = jnp.arange(1), jax.random.key(seed)
    latents = pipe.latents([prompt], size=size, seed=seed, steps=steps[0], scale=scales[0])
    b, key_b = pipe.stage_b, jax.random.fold_in(key, 1)
    made = b.denoise([prompt], latents, key_b, negative=None, size=size, steps=steps[1], scale=scales[1])
    found = (latents, made, b.task.first_stage.decode(b.groups, made))
    assert [x.shape for x in found] == [(1, 3, 6, 16), (1, 32, 64, 4), (1, 128, 256, 3)]

    sides = ((pipe.stage_c, key, (3, 6, 16)), (b, key_b, (32, 64, 4)))
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
