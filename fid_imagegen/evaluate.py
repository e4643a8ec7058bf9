"""python -m fid_imagegen.evaluate --workdir DIR [--features pixels] [--num 400] [--steps 1]

Fréchet distances of samples, and of as many training images, to the same held-out images; prints them and adds them to
WORKDIR/evaluation.jsonl. They are named after their features: none of these is an FID.
"""

import json
from pathlib import Path

from absl import app, flags

from fid_imagegen import command

WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a run", required=True)
FEATURES = flags.DEFINE_string("features", "pixels", "pixels; with --weights resnet56 (CIFAR-10) or augmentations")
WEIGHTS = flags.DEFINE_string("weights", None, "weights file of the feature network; of augmentations its run's folder")
NUM = flags.DEFINE_integer("num", 0, "images on each side; 0: all that are held out")
STEPS = flags.DEFINE_integer("steps", None, "sampling steps; default: 1, for a diffusion model 18")
SEED = flags.DEFINE_integer("seed", 0, "seed of the samples")


def main(argv):
    del argv
    from fid_imagegen.data import sources
    from fid_imagegen.evaluation.features import FEATURES as KNOWN
    from fid_imagegen.evaluation.generation import frechet_report
    from fid_imagegen.pipelines import ImageFunctionPipeline

    if FEATURES.value not in KNOWN:
        raise app.UsageError(f"found --features={FEATURES.value}, expected one of {sorted(KNOWN)}")
    pipe = ImageFunctionPipeline.from_pretrained(WORKDIR.value)
    extract = KNOWN[FEATURES.value](*([WEIGHTS.value] if WEIGHTS.value else []))
    num = NUM.value or len(sources.make_source(pipe.config.data, held_out=True))
    report = frechet_report(pipe, extract, num=num, seed=SEED.value, steps=STEPS.value)
    steps = STEPS.value or pipe.task.objective.sampling_steps
    report = {"features": FEATURES.value, "steps": steps, "seed": SEED.value} | report
    with (Path(WORKDIR.value) / "evaluation.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(report) + "\n")
    print(
        f"Fréchet distance, {FEATURES.value} features, {num} images a side: samples {report['samples']:.3f}, "
        f"training images {report['training']:.3f}"
    )


if __name__ == "__main__":
    command.run(main)
