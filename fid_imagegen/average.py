"""python -m fid_imagegen.average --runs A,B --out DIR [--weights 0.5,0.5]

The weighted average of runs of one architecture, as an exported folder: how the public Stage C was made, half the run on pictures
of mixed shapes and half its fine-tuning on artworks.
"""

from pathlib import Path

from absl import flags

from fid_imagegen import command

RUNS = flags.DEFINE_list("runs", None, "work directories or exported folders, separated by commas", required=True)
WEIGHTS = flags.DEFINE_list("weights", None, "one a run; default: equal ones")
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)


def main(argv):
    del argv
    from fid_imagegen.training.averaging import average

    weights = WEIGHTS.value or [1 / len(RUNS.value)] * len(RUNS.value)
    average([Path(run) for run in RUNS.value], [float(weight) for weight in weights], Path(OUT.value))
    print(f"averaged: {OUT.value}")


if __name__ == "__main__":
    command.run(main)
