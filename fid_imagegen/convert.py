"""python -m fid_imagegen.convert --decoder DIR --prior DIR --out OUT

Local copies of warp-ai/wuerstchen and warp-ai/wuerstchen-prior -> OUT/{stage_a,stage_b,stage_c}, which WuerstchenPipeline
loads. The semantic compressor is not among them: sampling does without, training takes it from the authors' file.

    --authors DIR --decoder_clip DIR --prior_clip DIR    the authors' .pt files instead, with CLIP H's and bigG's folders
    --to diffusers --model DIR    back: our stages -> OUT/{vqgan,decoder,prior}, which diffusers loads
    --unet DIR    a public consistency model instead, openai/diffusers-cd_imagenet64_l2/unet: an ImageFunctionPipeline
"""

import json
from pathlib import Path

from absl import app, flags

from fid_imagegen import command

DECODER = flags.DEFINE_string("decoder", None, "folder of vqgan/, decoder/, text_encoder/ and tokenizer/")
PRIOR = flags.DEFINE_string("prior", None, "folder of prior/, text_encoder/ and tokenizer/")
COMPRESSOR = flags.DEFINE_string("compressor", None, "model_v2_stage_b.pt, or its effnet_state_dict as safetensors")
AUTHORS = flags.DEFINE_string("authors", None, "folder of vqgan_f4_v1_500k, model_v2_stage_b and model_v3_stage_c.pt")
DECODER_CLIP = flags.DEFINE_string("decoder_clip", None, "with --authors: folder of CLIP H and its tokenizer")
PRIOR_CLIP = flags.DEFINE_string("prior_clip", None, "with --authors: folder of CLIP bigG and its tokenizer")
TO = flags.DEFINE_enum("to", "stages", ["stages", "diffusers"], "whose files to write")
MODEL = flags.DEFINE_string("model", None, "with --to=diffusers: folder of stage_a, stage_b and stage_c")
UNET = flags.DEFINE_string("unet", None, "folder of a UNet2DModel's config.json and weights")
CONFIG = flags.DEFINE_string(
    "config", None, "the recipe and precision, which the files do not say; default: the public's"
)
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)
INPUTS = (DECODER, PRIOR, COMPRESSOR, AUTHORS, DECODER_CLIP, PRIOR_CLIP, MODEL, UNET)
DIFFUSERS, AUTHORS_OWN = {"decoder", "prior"}, {"authors", "decoder_clip", "prior_clip"}
ALLOWED = (DIFFUSERS, DIFFUSERS | {"compressor"}, AUTHORS_OWN, {"unet"})


def write_stages(out: Path, files) -> None:
    from fid_imagegen.interop.public_wuerstchen import TEXT_FILE, public_stages
    from fid_imagegen.interop.safetensors_io import save_tree
    from fid_imagegen.training.runs import write_params

    def write(folder: Path, stage):
        write_params(folder, stage.config, stage.groups)
        if stage.text:
            save_tree(folder / TEXT_FILE, stage.text, {"format": "pt"})
            (folder / "tokenizer.json").write_text(stage.tokenizer.json(), encoding="utf-8")

    config = command.load_config(CONFIG.value or "configs/wuerstchen.py:published")
    for name, read in public_stages(files, config).items():
        write(out / name, read())


def write_unet(out: Path, folder: Path) -> None:
    from fid_imagegen.interop.unet import public_unet
    from fid_imagegen.training.runs import write_params

    recipe = command.load_config(CONFIG.value or "configs/imagenet64_cm_unet.py")
    config, params = public_unet(folder, recipe)
    write_params(out, config, {"generator": params})


def write_diffusers(out: Path, model: Path) -> None:
    from fid_imagegen.interop.public_wuerstchen import STAGES, WEIGHTS, diffusers_model
    from fid_imagegen.interop.safetensors_io import save_tree
    from fid_imagegen.training.runs import read_config, read_params

    configs = {stage: read_config(model / stage) for stage in STAGES}
    for stage in configs:
        name, config, tensors = diffusers_model(stage, configs, read_params(model / stage)[1])
        (out / name).mkdir()
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tree(out / name / WEIGHTS, tensors, {"format": "pt"})


def main(argv):
    del argv
    from fid_imagegen.interop.public_wuerstchen import authors_files, diffusers_files
    from fid_imagegen.training.runs import whole_folder

    given = {flag.name: Path(flag.value) for flag in INPUTS if flag.value}
    if set(given) not in ([{"model"}] if TO.value == "diffusers" else ALLOWED):
        raise app.UsageError(
            f"found {', '.join(f'--{name}' for name in given) or 'no input'} with --to={TO.value}, expected --decoder and "
            "--prior; --authors, --decoder_clip and --prior_clip; --unet; or --model with --to=diffusers"
        )
    with whole_folder(Path(OUT.value)) as out:
        if MODEL.value:
            write_diffusers(out, given["model"])
        elif UNET.value:
            write_unet(out, given["unet"])
        else:
            write_stages(out, authors_files(**given) if AUTHORS.value else diffusers_files(**given))
    print(f"converted: {OUT.value}")


if __name__ == "__main__":
    command.run(main)
