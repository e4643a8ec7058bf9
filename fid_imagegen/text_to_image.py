"""python -m fid_imagegen.text_to_image --model DIR --prompt "a red star at the top left" --out DIR

Writes one PNG an image, a contact sheet, and the seconds of each stage. `--prompts FILE` holds a prompt a line.
`--table params` or `cost` prints the model's parameters, or FLOPs a pass, by stage and stops.
"""

from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from fid_imagegen import command

MODEL = flags.DEFINE_string("model", None, "folder with stage_a, stage_b and stage_c", required=True)
PRIOR = flags.DEFINE_string("prior", "stage_c", "the folder in --model of Stage C, or of its twin of few steps")
DECODER = flags.DEFINE_string("decoder", "stage_b", "the folder in --model of Stage B, or of its twin of few steps")
PROMPT = flags.DEFINE_multi_string("prompt", [], "what to show; may be given several times")
PROMPTS = flags.DEFINE_string("prompts", None, "a text file of prompts, one a line")
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "what not to show")
HEIGHT = flags.DEFINE_integer("height", None, "pixels; default: the training size")
WIDTH = flags.DEFINE_integer("width", None, "pixels; default: the training size")
PRIOR_STEPS = flags.DEFINE_integer("prior_num_inference_steps", None, "Stage C's steps; default: the config's")
PRIOR_SCALE = flags.DEFINE_float("prior_guidance_scale", None, "Stage C's guidance; 1: none")
STEPS = flags.DEFINE_integer("num_inference_steps", None, "Stage B's steps; default: the config's")
SCALE = flags.DEFINE_float("decoder_guidance_scale", None, "Stage B's guidance; 1: none")
NUM = flags.DEFINE_integer("num_images_per_prompt", 1, "images of each prompt")
SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same images")
OUT = flags.DEFINE_string("out", "samples", "the folder for the images; made if it is not there")
TABLE = flags.DEFINE_enum("table", None, ["params", "cost"], "print a table of the model instead")


def read_prompts() -> list[str]:
    """Those of the flags and of the file. ValueError if there are none."""
    prompts = list(PROMPT.value)
    if PROMPTS.value:
        prompts += [line for line in Path(PROMPTS.value).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("found no prompt, expected one or more; give --prompt or --prompts")
    return prompts


def main(argv):
    del argv
    from fid_imagegen.evaluation.sheets import captioned_sheet
    from fid_imagegen.evaluation.stages import cost_table, parameter_table
    from fid_imagegen.pipelines import WuerstchenPipeline

    pipe = WuerstchenPipeline.from_pretrained(MODEL.value, PRIOR.value, DECODER.value)
    if TABLE.value:
        table = parameter_table(pipe) if TABLE.value == "params" else cost_table(pipe, HEIGHT.value, WIDTH.value)
        print("\n".join(f"{name:<32}{value:>20,.0f}" for name, value in table.items()))
        return
    prompts = read_prompts()
    images = pipe(
        prompts,
        negative_prompt=NEGATIVE.value,
        height=HEIGHT.value,
        width=WIDTH.value,
        prior_num_inference_steps=PRIOR_STEPS.value,
        prior_guidance_scale=PRIOR_SCALE.value,
        num_inference_steps=STEPS.value,
        decoder_guidance_scale=SCALE.value,
        num_images_per_prompt=NUM.value,
        seed=SEED.value,
    )
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(out / f"{number:05d}.png")
    beside = [np.concatenate(images[i : i + NUM.value], axis=1) for i in range(0, len(images), NUM.value)]
    captioned_sheet(prompts, beside).save(out / "contact_sheet.png")
    print(
        f"{len(images)} images in {out}; seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in sorted(pipe.seconds.items()))
    )


if __name__ == "__main__":
    command.run(main)
