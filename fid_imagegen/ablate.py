"""python -m fid_imagegen.ablate --model DIR --out DIR [--prompts FILE]

The paper's ablations of a trained model: text dropped in Stage B or C, the compressor's latents dropped in B, Stage C's latents
decoded by DIR/previewer, guidance and step sweeps; of a baseline (DIR/config.json, an LDM or a Stage B on text alone) what of
this it has. Writes OUT/ablations.json and one sheet an ablation, with the same prompts and seed throughout: OUT/prompts.png
shows which. A model of source `shapes` is asked for combinations held out of its training, and its pictures are judged.
"""

import json
from pathlib import Path

from absl import flags

from fid_imagegen import command

MODEL = flags.DEFINE_string(
    "model", None, "folder with stage_a, stage_b and stage_c, or of one baseline", required=True
)
OUT = flags.DEFINE_string("out", None, "the folder for sheets and numbers; made if it is not there", required=True)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "a text file of prompts, one a line; default for `shapes`: held-out ones"
)
NUM = flags.DEFINE_integer("num", 96, "held-out prompts of `shapes`")
SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same images")
SHOWN = 8


def load(model: Path):
    """(the data that the model was trained on, pictures(prompts, seed) of all ablations)."""
    from fid_imagegen.evaluation.ablations import baseline_ablations, load_previewer, wuerstchen_ablations
    from fid_imagegen.pipelines import LatentDiffusionPipeline, WuerstchenPipeline

    if (model / "config.json").exists():
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        return pipe.stage.config.data, lambda *asked: baseline_ablations(pipe, *asked)
    pipe = WuerstchenPipeline.from_pretrained(model)
    previewer = load_previewer(model / "previewer", pipe) if (model / "previewer").exists() else None
    return pipe.stage_c.config.data, lambda *asked: wuerstchen_ablations(pipe, previewer, *asked)


def asked_for(source: str) -> tuple[list[str], list | None]:
    """(prompts, their scenes where there is a judge). ValueError if there are none."""
    from fid_imagegen.data.shapes import held_out_prompts

    if PROMPTS.value:
        lines = Path(PROMPTS.value).read_text(encoding="utf-8").splitlines()
        if prompts := [line for line in lines if line.strip()]:
            return prompts, None
        raise ValueError(f"found no prompt in {PROMPTS.value}, expected one a line; give another --prompts")
    if source != "shapes":
        raise ValueError(f"found no --prompts for a model of source {source!r}, expected a file with one a line")
    scenes = held_out_prompts(NUM.value)
    return [scene.caption for scene in scenes], scenes


def main(argv):
    del argv
    from fid_imagegen.evaluation.ablations import measure
    from fid_imagegen.evaluation.sheets import captioned_sheet, contact_sheet

    data, pictures = load(Path(MODEL.value))
    prompts, scenes = asked_for(data.source)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    stream, sheets, table = pictures(prompts, SEED.value), {}, {}
    _, _, as_trained = next(stream)
    captioned_sheet(prompts[:SHOWN], as_trained[:SHOWN]).save(out / "prompts.png")
    for ablation, setting, images in stream:
        rows = sheets.setdefault(ablation, [("as trained", as_trained[:SHOWN])])
        rows.append((setting, images[:SHOWN]))
        contact_sheet(rows).save(out / f"{ablation}.png")
        found = table.setdefault(ablation, {})[setting] = measure(images, as_trained, scenes)
        print(f"{ablation:<18}{setting:>12}  {json.dumps(found)}")
    report = {"model": MODEL.value, "seed": SEED.value, "prompts": prompts}
    report |= {"as_trained": measure(as_trained, as_trained, scenes), "ablations": table}
    (out / "ablations.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"sheets and ablations.json: {out}")


if __name__ == "__main__":
    command.run(main)
