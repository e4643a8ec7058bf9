"""make demo-text: train the three stages on scenes of coloured shapes, show pictures of prompts, and check them by program.

The prompts are of combinations that training never showed. Interrupted, it saves; run again, it goes on. The same for the
baselines, `--config configs/shapes_wuerstchen.py:ldm`, `:text_only`, `:transformer`, `:b_text`, and of few steps, `:jumps` and
`:b_jumps`.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from fid_imagegen import command

WORKDIR = flags.DEFINE_string("workdir", "runs/demo-text", "where everything goes")
CONFIG = flags.DEFINE_string(
    "config", "configs/shapes_wuerstchen.py", "a config of source shapes, with an optional :argument"
)
JUDGED = 200
SHOWN = 24


def load(stages: tuple[str, ...], workdir: Path):
    """(the pipeline of a config's stages, twins in place of theirs; what its latents' statistics are if it has a compressor)."""
    from fid_imagegen.evaluation.latents import latent_report
    from fid_imagegen.pipelines import LatentDiffusionPipeline, WuerstchenPipeline

    if "stage_c" not in stages:
        return LatentDiffusionPipeline.from_pretrained(workdir / stages[-1]), {}
    decoder, prior = (f"{stage}_jumps" if f"{stage}_jumps" in stages else stage for stage in ("stage_b", "stage_c"))
    pipe = WuerstchenPipeline.from_pretrained(workdir, prior, decoder)
    return pipe, {"latents": latent_report(pipe.stage_b)}


def draw(stages: tuple[str, ...], scenes, images, workdir: Path) -> dict[str, Path]:
    """Sheet of prompts, pictures and true renders; training curves: name -> file."""
    from fid_imagegen.data.shapes import render
    from fid_imagegen.evaluation.sheets import captioned_sheet, training_curves
    from fid_imagegen.training.writers import read_metrics

    files = {name: workdir / f"{name}.png" for name in ("prompts", "training_curves")}
    truth = [render(scene, images.shape[1]) for scene in scenes[:SHOWN]]
    pairs = [np.concatenate(pair, axis=1) for pair in zip(images[:SHOWN], truth, strict=True)]
    captioned_sheet([scene.caption for scene in scenes[:SHOWN]], pairs).save(files["prompts"])
    training_curves([(stage, read_metrics(workdir / stage)) for stage in stages], files["training_curves"])
    return files


def measure(scenes, images) -> dict:
    """The pictures' alignment with their prompts, beside that of true renders and of pictures of other prompts."""
    from fid_imagegen.data.shapes import render
    from fid_imagegen.evaluation.shapes import score

    truth = np.stack([render(scene, images.shape[1]) for scene in scenes])
    return {
        "prompts": len(scenes),
        "alignment": score(images, scenes),
        "true_renders": score(truth, scenes),
        "shuffled_prompts": score(np.roll(images, 7, axis=0), scenes),
    }


def main(argv):
    del argv
    from fid_imagegen.data.shapes import held_out_prompts
    from fid_imagegen.training.phases import run

    began, workdir, config = time.monotonic(), Path(WORKDIR.value), command.load_config(CONFIG.value)
    print(f"training on {jax.devices()} into {workdir}; Ctrl-C saves, `make demo-text` goes on")
    if not run(config, str(workdir)):
        print(f"stopped and saved in {workdir}; run the same command to go on")
        return
    (pipe, latents), scenes = load(config.stages, workdir), held_out_prompts(JUDGED)
    images = pipe([scene.caption for scene in scenes])
    report = measure(scenes, images) | {"sampling_seconds": dict(pipe.seconds)} | latents
    report["seconds"] = time.monotonic() - began
    files = draw(config.stages, scenes, images, workdir)
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    for name, path in files.items():
        print(f"{name.replace('_', ' '):>17}: {path}")


if __name__ == "__main__":
    command.run(main)
