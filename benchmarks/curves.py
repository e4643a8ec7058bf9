"""Loss curves of a study's work units, and how much each oscillates.

    python -m benchmarks.curves --experiment runs/batches

A curve is cut into 40 windows of equally many images, so that batch sizes compare. `oscillation`: the deviation of the log of the
mean loss from one window to the next over the second half, when schedules change slowly. `ratio`: the last window over the first.
Writes EXPERIMENT/curves.json and a plot, curves.png: a panel for each batch size, a line a work unit.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fid_imagegen.training.writers import read_metrics

WINDOWS = 40


def windows(lines: list[dict]) -> np.ndarray:
    """Mean loss of each window of a run's logged steps."""
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    if len(losses) < WINDOWS:
        raise ValueError(
            f"found {len(losses)} logged losses, expected at least {WINDOWS}; train with a smaller config.log.every"
        )
    return np.array([part.mean() for part in np.array_split(losses, WINDOWS)])


def oscillation(means: np.ndarray) -> float:
    """Deviation of the log loss from window to window over the second half."""
    steps = np.diff(np.log(means[WINDOWS // 2 :]))
    return float(np.std(steps))


def plot(curves: list[dict], path: Path) -> None:
    """A panel for each batch size, a line a work unit, units of one network in one colour."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    batches = sorted({curve["batch_size"] for curve in curves})
    networks = sorted({curve["variant"] for curve in curves})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 3), squeeze=False, layout="constrained")
    for axis, batch in zip(axes[0], batches, strict=True):
        for curve in (curve for curve in curves if curve["batch_size"] == batch):
            color = f"C{networks.index(curve['variant'])}"
            axis.plot(np.linspace(0, 1, WINDOWS), curve["means"], color=color, label=curve["variant"], linewidth=1)
        handles = dict(reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True))
        axis.legend(handles.values(), handles.keys(), fontsize=7)
        axis.set(title=f"batch {batch}", xlabel="share of the images", yscale="log")
    axes[0][0].set_ylabel("loss")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="ROOT/EXPERIMENT of launch.run")
    args = parser.parse_args()
    curves = []
    for path in sorted(args.experiment.glob("*/manifest.json")):
        means = windows(read_metrics(path.parent))
        found = {"oscillation": oscillation(means), "ratio": float(means[-1] / means[0])}
        curves.append(json.loads(path.read_text())["overrides"] | found | {"means": means.tolist()})
        print(path.parent.name, json.dumps(found), flush=True)
    if not curves:
        parser.error(f"found no work units in {args.experiment}, expected ROOT/EXPERIMENT of launch.run; correct it")
    (args.experiment / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
    plot(curves, args.experiment / "curves.png")


if __name__ == "__main__":
    main()
