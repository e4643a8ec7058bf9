"""Scores every work unit of a study and sets its arms side by side.

    python -m benchmarks.study --experiment runs/generators [--features pixels]
    python -m benchmarks.study --experiment runs/faces --features resnet56 --weights cifar10_resnet56.npz --resize 32

An arm is all work units that differ in nothing but `seed`. Of each: the Fréchet distance of samples to held-out images on named
features, for digits the share that a judge is sure of, and how well renders at twice and four times the training size, averaged
back to it, agree with those at it (PSNR in dB): a distance on the training grid sees nothing of what lies between its pixels.
Two arms whose means are closer than the larger of their seeds' spreads are undecided. Units that did not reach their last step
are left out. Writes EXPERIMENT/study.json and a plot, study.png.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from fid_imagegen.data import sources
from fid_imagegen.evaluation.digits import DigitJudge
from fid_imagegen.evaluation.features import FEATURES, Extract
from fid_imagegen.evaluation.generation import frechet_report, native_samples
from fid_imagegen.models.rendering import quantise
from fid_imagegen.pipelines import ImageFunctionPipeline
from fid_imagegen.pipelines.image_functions import RenderableFunctions
from fid_imagegen.tasks.generator import to_float

JUDGED = 1000
ENLARGED = 64  # functions that are rendered at FACTORS times the training size
FACTORS = (2, 4)


def finished(experiment: Path) -> Iterator[tuple[Path, dict]]:
    """(folder, overrides) of the work units that have the checkpoint of their last step; says which have not."""
    for manifest in sorted(experiment.glob("*/manifest.json")):
        unit, config = manifest.parent, manifest.parent / "config.json"
        last = json.loads(config.read_text())["num_steps"] if config.exists() else None
        if (unit / "checkpoints" / str(last)).exists():
            yield unit, json.loads(manifest.read_text())["overrides"]
        else:
            print(f"{unit.name}: left out, it has not reached its last step", flush=True)


def score(folder: Path, extract, *, steps: int | None) -> dict[str, float]:
    """{"frechet", "psnr_2x", "psnr_4x", and of digits "judged"} of one work unit."""
    pipe = ImageFunctionPipeline.from_pretrained(folder)
    data = pipe.config.data
    num = len(sources.make_source(data, held_out=True))
    found = {"frechet": frechet_report(pipe, extract, num=num, steps=steps)["samples"]}
    if data.source == "digits":
        found["judged"] = DigitJudge(data).judge(native_samples(pipe, JUDGED, steps=steps))["confident"]
    functions = pipe.generate(ENLARGED, steps=steps)
    return found | {f"psnr_{factor}x": agreement(functions, data.image_size, factor) for factor in FACTORS}


def agreement(functions: RenderableFunctions, size: int, factor: int) -> float:
    """PSNR in dB, over all of them, of renders at `factor` x `size`, averaged factor x factor, against those at `size`."""
    large = functions.render(factor * size, factor * size).astype(np.float64)
    averaged = large.reshape(len(large), size, factor, size, factor, -1).mean((2, 4))
    error = np.mean((averaged - functions.render(size, size)) ** 2)
    return float(10 * np.log10(255**2 / error))


def resized(extract: Extract, size: int) -> Extract:
    """Features of images brought to size x size by cubics, the same for real ones and samples."""

    def of_resized(images):
        shape = (len(images), size, size, images.shape[-1])
        return extract(np.asarray(quantise(jax.image.resize(to_float(images), shape, "cubic"))))

    return of_resized


def arms(units: list[dict]) -> dict[str, list[dict]]:
    """{an arm's overrides but for the seed: its units}."""
    grouped = {}
    for unit in units:
        overrides = {key: value for key, value in unit["overrides"].items() if key != "seed"}
        grouped.setdefault(json.dumps(overrides), []).append(unit)
    return grouped


def summary(units: list[dict], metric: str) -> dict[str, float]:
    """Mean over seeds, and their spread, largest less smallest."""
    values = [unit[metric] for unit in units]
    return {"mean": float(np.mean(values)), "spread": float(np.ptp(values)), "seeds": len(values)}


def decided(one: dict, other: dict) -> bool:
    """Whether two summaries differ by more than their seeds do; those of one seed do not say."""
    return min(one["seeds"], other["seeds"]) > 1 and abs(one["mean"] - other["mean"]) > max(
        one["spread"], other["spread"]
    )


def plot(grouped: dict[str, list[dict]], metric: str, path: Path) -> None:
    """One line an arm: a dot a seed, and a bar at their mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(grouped) + 1), layout="constrained")
    for row, units in enumerate(grouped.values()):
        values = [unit[metric] for unit in units]
        axes.plot(values, [row] * len(values), "o", color="C0")
        axes.plot(np.mean(values), row, "|", color="C1", markersize=20)
    axes.set_yticks(range(len(grouped)), [_short(name) for name in grouped])
    axes.set_ylim(len(grouped) - 0.5, -0.5)
    axes.set_xlabel(metric)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _short(name: str) -> str:
    values = json.loads(name)
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in values.items())[:60]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="ROOT/EXPERIMENT of launch.run")
    parser.add_argument("--features", default="pixels", choices=sorted(FEATURES))
    parser.add_argument("--weights", help="of the features, where they need any")
    parser.add_argument("--resize", type=int, help="pixels a side that images are resized to before features are taken")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the objective's")
    args = parser.parse_args()
    extract = FEATURES[args.features](*([args.weights] if args.weights else []))
    if args.resize:
        extract = resized(extract, args.resize)
    units = []
    for unit, overrides in finished(args.experiment):
        found = score(unit, extract, steps=args.steps)
        units.append({"unit": unit.name, "overrides": overrides, **found})
        print(unit.name, found, flush=True)
    if not units:
        parser.error(
            f"found no finished work units in {args.experiment}, expected ROOT/EXPERIMENT of launch.run; correct --experiment"
        )
    metrics = [metric for metric in units[0] if metric not in ("unit", "overrides")]
    grouped = arms(units)
    table = {name: {metric: summary(group, metric) for metric in metrics} for name, group in grouped.items()}
    best = min(table, key=lambda name: table[name]["frechet"]["mean"])
    for name, found in table.items():
        differs = decided(found["frechet"], table[best]["frechet"])
        found["against_best"] = "itself" if name == best else "decided" if differs else "undecided"
        print(_short(name), json.dumps(found))
    report = {"features": args.features, "resize": args.resize, "steps": args.steps, "arms": table, "units": units}
    (args.experiment / "study.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(grouped, "frechet", args.experiment / "study.png")


if __name__ == "__main__":
    main()
