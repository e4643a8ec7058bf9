"""The public Würstchen v2 as a whole: diffusers' folders or the authors' .pt files <-> configs and groups of our stages."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fid_imagegen.data.tokenizer import Tokenizer, clip_tokenizer
from fid_imagegen.interop import efficientnet, paella_vq, wuerstchen
from fid_imagegen.interop.clip import clip_state_dict, load_clip
from fid_imagegen.interop.state_dict import read_state_dict
from fid_imagegen.models.text.clip import TOWERS, CLIPTextEncoder
from fid_imagegen.models.wuerstchen.compressor import PUBLISHED, build_compressor
from fid_imagegen.models.wuerstchen.stage_a import PaellaVQ
from fid_imagegen.models.wuerstchen.stage_b import PUBLIC_STAGE_B, StageB
from fid_imagegen.models.wuerstchen.stage_c import PUBLIC_STAGE_C, StageC

STAGES = ("stage_a", "stage_b", "stage_c")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "text.safetensors"  # the text tower beside a stage's model.safetensors, under Hugging Face's names
SIZES = {"image": 1024, "compressor": 768}  # pixels in the last phases of training: a latent stands for 128/3 of them
# Our fields of Stage A's config, and diffusers' names; `levels` and `scale_factor` need more than another name.
VQGAN_FIELDS = {
    "bottleneck_blocks": "bottleneck_blocks",
    "latent_channels": "latent_channels",
    "codebook_size": "num_vq_embeddings",
    "patch": "up_down_scale_factor",
}
STAGE_B_FIELDS = tuple(name for name in PUBLIC_STAGE_B if name != "text")
CHANNELS = 3


class Files(NamedTuple):
    """Where the parts of a public model lie: weights files, and folders of Hugging Face's CLIP towers and tokenizers."""

    vqgan: Path
    decoder: Path
    prior: Path
    decoder_text: Path
    prior_text: Path
    decoder_tokenizer: Path
    prior_tokenizer: Path
    compressor: Path | None  # the semantic compressor: training needs it, sampling does not


class Stage(NamedTuple):
    """What the folder of one stage holds."""

    config: ConfigDict
    groups: dict[str, Any]
    text: dict[str, np.ndarray] | None  # tensors of TEXT_FILE
    tokenizer: Tokenizer | None


def diffusers_files(decoder: Path, prior: Path, compressor: Path | None = None) -> Files:
    """Of local copies of warp-ai/wuerstchen and warp-ai/wuerstchen-prior. FileNotFoundError lists all that is not there."""
    towers = [folder / "text_encoder" for folder in (decoder, prior)]
    tokenizers = [folder / "tokenizer" for folder in (decoder, prior)]
    weights = [decoder / "vqgan" / WEIGHTS, decoder / "decoder" / WEIGHTS, prior / "prior" / WEIGHTS]
    configs = [file.with_name("config.json") for file in weights]
    return _checked(Files(*weights, *towers, *tokenizers, compressor), configs)


def authors_files(authors: Path, decoder_clip: Path, prior_clip: Path) -> Files:
    """Of dome272's three .pt files, and of folders with the towers and tokenizers of CLIP H and CLIP bigG."""
    vqgan, decoder, prior = (
        authors / name for name in ("vqgan_f4_v1_500k.pt", "model_v2_stage_b.pt", "model_v3_stage_c.pt")
    )
    clips = (decoder_clip, prior_clip)
    return _checked(Files(vqgan, decoder, prior, *clips, *clips, compressor=decoder), [])


def public_stages(files: Files, configs: ConfigDict) -> dict[str, Callable[[], Stage]]:
    """Readers of the three stages by name, to be called one after the other: no two need to be in memory at once.

    configs: one of each stage, of the published recipe; sizes are those of the config.json beside the weights, where there is
    one. Raises ValueError, as the readers do, for what does not fit, and for weights of Stable Cascade or v1.
    """
    configs = _sized(files, configs)
    a, b, c = (configs[stage] for stage in STAGES)
    tokenizers = [clip_tokenizer(folder) for folder in (files.decoder_tokenizer, files.prior_tokenizer)]

    def stage_a() -> Stage:
        model, what = build_vqgan(a.model), "weights of Würstchen's Stage A"
        tensors = read_state_dict(files.vqgan, what, wuerstchen.REMEDY, wuerstchen.ENTRIES)
        variables = paella_vq.from_state_dict(model, tensors, str(files.vqgan))
        groups = {"vqgan": variables["params"], "vqgan_stats": {"batch_stats": variables["batch_stats"]}}
        return Stage(a, groups, None, None)

    def stage_b() -> Stage:
        groups = {"stage_b": wuerstchen.load_stage(build_stage_b(b), files.decoder)}
        if files.compressor:
            groups |= _compressor(files.compressor, b.compressor)
        return Stage(b, groups, _tower(b.text.encoder, files.decoder_text), tokenizers[0])

    def stage_c() -> Stage:
        groups = {"stage_c": wuerstchen.load_stage(build_stage_c(c), files.prior)}
        return Stage(c, groups, _tower(c.text.encoder, files.prior_text), tokenizers[1])

    return {"stage_a": stage_a, "stage_b": stage_b, "stage_c": stage_c}


def diffusers_model(
    stage: str, configs: Mapping[str, ConfigDict], groups: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """(folder, config.json, tensors) by which diffusers loads a stage.

    Raises ValueError for what diffusers' classes and samplers cannot express: other networks, forms and scales.
    """
    config = configs[stage]
    if stage == "stage_a":
        return "vqgan", _vqgan_json(config, configs["stage_b"]), _vqgan_tensors(config, groups)
    form = {"stage_b": "eps_ab_sigmoid", "stage_c": "eps_ab"}[stage]
    wrong = {"form": config.form} if config.form != form else {}
    if stage == "stage_b":
        if config.text.encoder == "none":
            wrong["text.encoder"] = "none"
        folder, kind, model = "decoder", "WuerstchenDiffNeXt", build_stage_b(config)
        fields = {name: getattr(model, name) for name in STAGE_B_FIELDS} | {"c_out": model.c_in}
    else:
        if config.model.network != "convnext":
            wrong["model.network"] = config.model.network
        if config.latent_scale != "published":
            wrong["latent_scale"] = config.latent_scale
        folder, kind, model = "prior", "WuerstchenPrior", build_stage_c(config)
        fields = {name: getattr(model, name) for name in PUBLIC_STAGE_C}
    if wrong:
        raise ValueError(
            f"found {', '.join(f'config.{stage}.{name} {value!r}' for name, value in wrong.items())}, expected the published "
            "model's, the only one diffusers samples: form "
            f"{form!r}, text, 'convnext', latent_scale 'published'; train with configs/wuerstchen.py:published"
        )
    return folder, {"_class_name": kind} | fields, wuerstchen.to_state_dict(model, groups[stage])


def build_vqgan(config) -> PaellaVQ:
    """Stage A of `config.vqgan`, or of a Stage A's `config.model`."""
    return PaellaVQ(levels=tuple(config.levels), **{name: config[name] for name in VQGAN_FIELDS})


def build_stage_b(config) -> StageB:
    """Stage B of a stage's config, with text."""
    fields = {name: config.model[name] for name in STAGE_B_FIELDS}
    return StageB(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}, text=True)


def build_stage_c(config) -> StageC:
    """Stage C of a stage's config."""
    return StageC(**{name: config.model[name] for name in PUBLIC_STAGE_C})


def _checked(files: Files, configs: list[Path]) -> Files:
    wanted = [files.vqgan, files.decoder, files.prior, *configs, *filter(None, [files.compressor])]
    wanted += [folder / "config.json" for folder in (files.decoder_text, files.prior_text)]
    if missing := [str(file) for file in dict.fromkeys(wanted) if not file.is_file()]:
        raise FileNotFoundError(
            f"found no {', no '.join(missing)}; expected local copies of warp-ai/wuerstchen and warp-ai/wuerstchen-prior, or "
            "the authors' files of v2 and CLIP's folders; download what is missing, or correct the path"
        )
    return files


def _sized(files: Files, configs: ConfigDict) -> ConfigDict:
    """The configs with the sizes of the files."""
    configs = ConfigDict(configs.to_dict())  # unlocked, and the caller's stays as it is
    a, b, c = (configs[stage] for stage in STAGES)
    b.data.image_size = SIZES["image"]
    c.data.image_size = b.compressor.size = c.compressor.size = SIZES["compressor"]
    names = ("in_channels", "out_channels", "embed_dim", "levels", "scale_factor", *VQGAN_FIELDS.values())
    if theirs := _read_json(files.vqgan, names):
        if (theirs["in_channels"], theirs["out_channels"]) != (CHANNELS, CHANNELS):
            raise ValueError(
                f"found in_channels {theirs['in_channels']} and out_channels {theirs['out_channels']} beside {files.vqgan}, "
                f"expected {CHANNELS} each; convert a model of colour pictures"
            )
        vqgan = {name: theirs[their] for name, their in VQGAN_FIELDS.items()} | {"levels": _levels(theirs)}
        a.model.update(vqgan)
        b.vqgan.update(vqgan)
        b.latent_scale = theirs["scale_factor"]
    if theirs := _read_json(files.decoder, STAGE_B_FIELDS):
        fields = {name: theirs[name] for name in STAGE_B_FIELDS}
        b.model.update({k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    if theirs := _read_json(files.prior, PUBLIC_STAGE_C):
        c.model.update({name: theirs[name] for name in PUBLIC_STAGE_C})
    if (b.model.c_in, b.model.effnet_embd) != (b.vqgan.latent_channels, c.model.c_in):
        raise ValueError(
            f"found a decoder of {b.model.c_in} latent and {b.model.effnet_embd} compressor channels, expected "
            f"{b.vqgan.latent_channels} as the vqgan has and {c.model.c_in} as the prior has; give parts of one model"
        )
    b.compressor.channels = c.compressor.channels = c.model.c_in
    for stage, width in ((b, b.model.clip_embd), (c, c.model.c_cond)):
        stage.text.update({"encoder": _tower_name(width), "weights": f"./{TEXT_FILE}"})
    return configs


def _read_json(weights: Path, names) -> dict[str, Any]:
    """The config.json beside a weights file, empty where there is none. ValueError for another model's."""
    path = weights.with_name("config.json")
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"found {path} unreadable ({error}), expected JSON; copy the file again") from error
    kind = found.get("_class_name", "")
    if "StableCascade" in kind:
        raise ValueError(
            f"found a {kind} in {path}: Stable Cascade (v3), expected Würstchen v2; "
            "give the files of warp-ai/wuerstchen and warp-ai/wuerstchen-prior"
        )
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"found no {', '.join(missing)} in {path}, expected diffusers' config of it; copy the file again"
        )
    return found


def _levels(theirs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(theirs["embed_dim"] // 2**i for i in reversed(range(theirs["levels"])))


def _tower_name(width: int) -> str:
    """Which of CLIP's towers has tokens that wide."""
    widths = {tower["width"]: name for name, tower in TOWERS.items()}
    if width not in widths:
        raise ValueError(
            f"found a network that reads text of width {width}, expected one of {sorted(widths)}: the text towers "
            f"{sorted(TOWERS)}; check the config.json beside the weights"
        )
    return widths[width]


def _tower(name: str, folder: Path) -> dict[str, np.ndarray]:
    return clip_state_dict(load_clip(folder, CLIPTextEncoder(**TOWERS[name])))


def _compressor(file: Path, config) -> dict[str, Any]:
    """Groups of the semantic compressor. The latents' moments are those that the public Stage C takes them to have."""
    model = build_compressor(config.name, channels=config.channels)
    what = "weights of the semantic compressor"
    tensors = read_state_dict(file, what, wuerstchen.REMEDY, ("effnet_state_dict",))
    variables = efficientnet.from_state_dict(model, tensors, str(file))
    moments = {"mean": PUBLISHED["mean"], "variance": PUBLISHED["deviation"] ** 2}
    latents = {name: np.full(config.channels, value, np.float32) for name, value in moments.items()}
    stats = {"batch_stats": variables["batch_stats"], "latents": latents}
    return {"compressor": variables["params"], "compressor_stats": stats}


def _vqgan_json(config, decoder_config) -> dict[str, Any]:
    levels = tuple(config.model.levels)
    theirs = {"_class_name": "PaellaVQModel", "in_channels": CHANNELS, "out_channels": CHANNELS}
    theirs |= {their: config.model[name] for name, their in VQGAN_FIELDS.items()}
    theirs |= {"levels": len(levels), "embed_dim": levels[-1], "scale_factor": decoder_config.latent_scale}
    if _levels(theirs) != levels or config.data.channels != CHANNELS:
        raise ValueError(
            f"found a Stage A of levels {levels} for {config.data.channels} channels, expected {_levels(theirs)} for "
            f"{CHANNELS}: diffusers knows no other; train one of these"
        )
    return theirs


def _vqgan_tensors(config, groups: Mapping[str, Any]) -> dict[str, np.ndarray]:
    variables = {"params": groups["vqgan"]} | dict(groups["vqgan_stats"])
    return paella_vq.to_state_dict(build_vqgan(config.model), variables, authors=False)
