"""Zero-shot edits of held-out images, beside what is known with the mean image in the place of the rest.

    python -m benchmarks.edits --workdir runs/demo --out runs/edits

Of half of an image, of the means of blocks of 2 pixels, and of the luma where there are colours: PSNR to the images themselves
(dB, all pixels; several answers may be right) and the Fréchet distance in pixels to them. Writes OUT/edits.json and sheets of
image, what was known, edit, and edit at eight times the size.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fid_imagegen.data import pipeline, sources
from fid_imagegen.diffusion.editing import replaced
from fid_imagegen.evaluation.distances import frechet_distance, gaussian_statistics
from fid_imagegen.evaluation.features import FEATURES
from fid_imagegen.evaluation.sheets import contact_sheet
from fid_imagegen.models.rendering import quantise
from fid_imagegen.pipelines import ImageFunctionPipeline
from fid_imagegen.pipelines.edits import projection
from fid_imagegen.tasks.generator import to_float

SHOWN = 16


def settings(size: int, channels: int) -> dict[str, dict]:
    """What of an image of `size` pixels a side each edit is given."""
    half = np.zeros((size, size), np.int32)
    half[:, : size // 2] = 1
    edits = {"inpaint": {"mask": half}, "super_resolve": {"factor": 2}}
    return edits | ({"colourise": {}} if channels == 3 else {})


def scores(made: np.ndarray, images: np.ndarray, extract) -> dict[str, float]:
    """{"psnr", "frechet"} of uint8 images."""
    error = np.mean(((made.astype(np.float64) - images) / 255) ** 2)
    distance = frechet_distance(*(gaussian_statistics(extract(each)) for each in (made, images)))
    return {"psnr": float(-10 * np.log10(error)), "frechet": distance}


def run(pipe: ImageFunctionPipeline, steps: int, out: Path) -> dict:
    """Scores of every edit and of its baseline; draws the sheets."""
    data, extract = pipe.config.data, FEATURES["pixels"]()
    held_out, training = sources.make_source(data, held_out=True), sources.make_source(data)
    images = pipeline.examples(held_out, data, range(len(held_out)))
    mean = to_float(pipeline.examples(training, data, range(len(training)))).mean(axis=0, keepdims=True)
    size, report = data.image_size, {}
    for edit, given in settings(size, data.channels).items():
        project = projection(edit, given.get("mask"), given.get("factor"))
        known = np.asarray(quantise(replaced(mean, project(to_float(images)), project)))
        functions = pipe.edit(images, edit, steps=steps, **given)
        made = functions.render(size, size)
        report[edit] = {"edit": scores(made, images, extract), "mean": scores(known, images, extract)}
        large = functions[:SHOWN].render(8 * size, 8 * size)
        rows = {"image": images, "known": known, "edit": made, "at 8x": large}
        sheet = contact_sheet([(name, each[:SHOWN]) for name, each in rows.items()], cell=64)
        sheet.save(out / f"{edit}.png")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run or an exported folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    pipe = ImageFunctionPipeline.from_pretrained(args.workdir)
    args.out.mkdir(parents=True, exist_ok=True)
    report = run(pipe, args.steps, args.out)
    (args.out / "edits.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
