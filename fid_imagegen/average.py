"""python -m fid_imagegen.average --runs A,B --out DIR [--weights 0.5,0.5] or --runs A --width 0.08 --out DIR

The weighted average of runs of one architecture, as an exported folder: how the public Stage C was made, half the run on pictures
of mixed shapes and half its fine-tuning on artworks. With --width the power average of that relative width of one run, made
afterwards from the snapshots that `config.ema_snapshots` left.
"""

from pathlib import Path

from absl import app, flags

from fid_imagegen import command

RUNS = flags.DEFINE_list("runs", None, "work directories or exported folders, separated by commas", required=True)
WEIGHTS = flags.DEFINE_list("weights", None, "one a run; default: equal ones")
WIDTH = flags.DEFINE_float("width", None, "relative width of a power average of one run")
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)


def main(argv):
    del argv
    from fid_imagegen.training.averaging import average, average_of_width

    if WIDTH.value is not None:
        if len(RUNS.value) != 1 or WEIGHTS.value:
            raise app.UsageError("found --width with several runs or weights, expected one run")
        average_of_width(Path(RUNS.value[0]), WIDTH.value, Path(OUT.value))
        print(f"averaged: {OUT.value}")
        return
    weights = WEIGHTS.value or [1 / len(RUNS.value) for _ in RUNS.value]
    average([Path(run) for run in RUNS.value], [float(weight) for weight in weights], Path(OUT.value))
    print(f"averaged: {OUT.value}")


if __name__ == "__main__":
    command.run(main)
