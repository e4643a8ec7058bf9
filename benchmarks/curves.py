"""Loss curves of a study's work units, and how much each oscillates.

    python -m benchmarks.curves --experiment runs/batches
    python -m benchmarks.curves --experiment runs/pretraining --against seconds

A curve is cut into 40 windows of equally many images, so that batch sizes compare. `oscillation`: the deviation of the log of the
mean loss from one window to the next over the second half, when schedules change slowly. `ratio`: the last window over the first.
`seconds`: of the steps, after those of the pre-training where there was one; compiling counts, as part of the first logged ones.
Units that did not reach their last step are left out. Writes EXPERIMENT/curves.json and a plot, curves.png: a panel for each
batch size, a line a work unit.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.study import finished
from fid_imagegen.training.writers import read_metrics

WINDOWS = 40
SIZES = ("seed", "batch_size", "accumulate", "num_steps")


def windows(lines: list[dict]) -> np.ndarray:
    """Mean loss of each window of a run's logged steps."""
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    if len(losses) < WINDOWS:
        raise ValueError(
            f"found {len(losses)} logged losses, expected at least {WINDOWS}; train with a smaller config.log.every"
        )
    return np.array([part.mean() for part in np.array_split(losses, WINDOWS)])


def seconds(unit: Path, batch_size: int) -> np.ndarray:
    """Where a run's windows end, by what its steps took; pre-training is before them."""
    before = unit / "pretrain"
    start = _durations(before, _config(before)["batch_size"]).sum() if before.exists() else 0.0
    return np.array([start + part[-1] for part in np.array_split(np.cumsum(_durations(unit, batch_size)), WINDOWS)])


def _durations(workdir: Path, batch_size: int) -> np.ndarray:
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    steps = np.diff([0, *(line["step"] for line in lines)])
    return steps * batch_size / np.array([line["images_per_second"] for line in lines])


def _config(workdir: Path) -> dict:
    return json.loads((workdir / "config.json").read_text())


def label(overrides: dict) -> str:
    """What tells an arm from others: overrides that are neither the seed nor of the batch size."""
    return ", ".join(str(value) for key, value in overrides.items() if key not in SIZES) or "all"


def oscillation(means: np.ndarray) -> float:
    """Deviation of the log loss from window to window over the second half."""
    steps = np.diff(np.log(means[WINDOWS // 2 :]))
    return float(np.std(steps))


def plot(curves: list[dict], against: str, path: Path) -> None:
    """A panel for each batch size, a line a work unit, units of one arm in one colour."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    batches, arms = (sorted({curve[name] for curve in curves}) for name in ("batch_size", "arm"))
    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 3), squeeze=False, layout="constrained")
    for axis, batch in zip(axes[0], batches, strict=True):
        for curve in (curve for curve in curves if curve["batch_size"] == batch):
            color = f"C{arms.index(curve['arm'])}"
            axis.plot(curve[against], curve["means"], color=color, label=curve["arm"], linewidth=1)
        handles = dict(reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True))
        axis.legend(handles.values(), handles.keys(), fontsize=7)
        xlabel = "share of the images" if against == "images" else "seconds, with pre-training"
        axis.set(title=f"batch {batch}", xlabel=xlabel, yscale="log")
    axes[0][0].set_ylabel("loss")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def curve(unit: Path, overrides: dict, against: str) -> dict:
    """What is reported of a work unit."""
    means, batch_size = windows(read_metrics(unit)), _config(unit)["batch_size"]
    places = np.linspace(0, 1, WINDOWS) if against == "images" else seconds(unit, batch_size)
    return overrides | {
        "arm": label(overrides),
        "batch_size": batch_size,
        "oscillation": oscillation(means),
        "ratio": float(means[-1] / means[0]),
        "means": means.tolist(),
        against: places.tolist(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="ROOT/EXPERIMENT of launch.run")
    parser.add_argument(
        "--against", default="images", choices=("images", "seconds"), help="what the loss is drawn over"
    )
    args = parser.parse_args()
    curves = []
    for unit, overrides in finished(args.experiment):
        curves.append(curve(unit, overrides, args.against))
        print(unit.name, json.dumps({name: curves[-1][name] for name in ("oscillation", "ratio")}), flush=True)
    if not curves:
        parser.error(
            f"found no finished work units in {args.experiment}, expected ROOT/EXPERIMENT of launch.run; correct it"
        )
    (args.experiment / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
    plot(curves, args.against, args.experiment / "curves.png")


if __name__ == "__main__":
    main()
