"""make demo: train a generator of digit functions on this machine, show them at several sizes, and measure them.

What it leaves in the work directory is printed at the end. Interrupted, it saves; run again, it goes on.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from fid_imagegen import command

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "where everything goes")
CONFIG = flags.DEFINE_string("config", "configs/digits_cm_func.py", "a config of digits, with an optional :argument")
SIZES = ((8, 8), (32, 32), (128, 128), (96, 160))
JUDGED = 1000


def draw(pipe, workdir: Path) -> dict[str, Path]:
    """Contact sheet of 16 functions, reconstructions of 16 held-out digits, training curves: name -> file."""
    from fid_imagegen.data import pipeline, sources
    from fid_imagegen.evaluation.sheets import contact_sheet, training_curves
    from fid_imagegen.models.rendering import render
    from fid_imagegen.pipelines import ImageFunctionPipeline
    from fid_imagegen.tasks.generator import to_float
    from fid_imagegen.training.writers import read_metrics

    functions = pipe.generate(16, seed=0)
    files = {name: workdir / f"{name}.png" for name in ("contact_sheet", "reconstructions", "training_curves")}
    rows = [(f"{h}x{w}", functions.render(h, w)) for h, w in SIZES]
    contact_sheet(rows).save(files["contact_sheet"])
    predictor = ImageFunctionPipeline.from_pretrained(workdir / "pretrain")
    data = pipe.config.data
    inputs = pipeline.examples(sources.make_source(data, held_out=True), data, range(16))
    made = predictor.task.reconstruct(predictor.params, to_float(jnp.asarray(inputs)))
    rows = [("held out", inputs), *((f"function {n}", render(made, n, n, dtype="uint8")) for n in (8, 64))]
    contact_sheet(rows).save(files["reconstructions"])
    phases = [("pre-training", read_metrics(workdir / "pretrain")), ("consistency", read_metrics(workdir))]
    training_curves(phases, files["training_curves"])
    return files


def measure(pipe, workdir: Path) -> dict:
    """Judged samples, held-out PSNR, and Fréchet distances in pixels before and after training."""
    from fid_imagegen.data import pipeline, sources
    from fid_imagegen.evaluation.digits import DigitJudge
    from fid_imagegen.evaluation.features import pixels
    from fid_imagegen.evaluation.generation import frechet_report, native_samples
    from fid_imagegen.pipelines import ImageFunctionPipeline
    from fid_imagegen.tasks.reconstruction import rendered_psnr

    data = pipe.config.data
    judge, held_out = DigitJudge(data), sources.make_source(data, held_out=True)
    num, images = len(held_out), pipeline.examples(held_out, data, range(len(held_out)))
    predictor = ImageFunctionPipeline.from_pretrained(workdir / "pretrain")
    untrained = ImageFunctionPipeline(pipe.config, predictor.params)
    after = frechet_report(pipe, pixels(), num=num)
    return {
        "judge_accuracy": judge.accuracy,
        "judged_real": judge.real,
        "judged_samples": judge.judge(native_samples(pipe, JUDGED)),
        "held_out_psnr_db": rendered_psnr(predictor.task, predictor.params, images),
        "held_out_psnr_behind_trunk_db": rendered_psnr(predictor.task, predictor.params, images, trunk=True),
        "frechet_pixels_images": num,
        "frechet_pixels_before": frechet_report(untrained, pixels(), num=num)["samples"],
        "frechet_pixels_after": after["samples"],
        "frechet_pixels_training_images": after["training"],
    }


def main(argv):
    del argv
    from fid_imagegen.pipelines import ImageFunctionPipeline
    from fid_imagegen.training.phases import run

    began, workdir = time.monotonic(), Path(WORKDIR.value)
    print(f"training on {jax.devices()} into {workdir}; Ctrl-C saves, `make demo` goes on")
    if not run(command.load_config(CONFIG.value), str(workdir)):
        print(f"stopped and saved in {workdir}; run the same command to go on")
        return
    pipe = ImageFunctionPipeline.from_pretrained(workdir)
    files = draw(pipe, workdir)
    report = measure(pipe, workdir) | {"seconds": time.monotonic() - began}
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    for name, path in {**files, "metrics": workdir / "metrics.jsonl", "checkpoint": workdir / "checkpoints"}.items():
        print(f"{name.replace('_', ' '):>17}: {path}")


if __name__ == "__main__":
    command.run(main)
