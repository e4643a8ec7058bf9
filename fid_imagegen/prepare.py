"""python -m fid_imagegen.prepare --tars 'DIR/*.tar' --out DIR [--min_side=512 ...]

img2dataset's WebDataset tars -> ArrayRecord files, with the Würstchen paper's filters. Prints what was dropped and why; the
same is in OUT/prepared.json. Train on it with --config.data.source=prepared --config.data.path=OUT.
"""

import glob
from pathlib import Path

from absl import flags

from fid_imagegen import command
from fid_imagegen.data.filters import PAPER, Filters

TARS = flags.DEFINE_string("tars", None, "glob of the tars, in quotes", required=True)
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)
MIN_SIDE = flags.DEFINE_integer("min_side", PAPER.min_side, "pixels of the shorter side, stored and original")
MAX_SIDE = flags.DEFINE_integer("max_side", PAPER.max_side, "pixels of the longer side, stored and original")
MAX_PUNSAFE = flags.DEFINE_float("max_punsafe", PAPER.max_punsafe, "probability; 1: also without a score")
MAX_PWATERMARK = flags.DEFINE_float("max_pwatermark", PAPER.max_pwatermark, "probability; 1: also without a score")
MIN_AESTHETIC = flags.DEFINE_float("min_aesthetic", PAPER.min_aesthetic, "LAION's score; 0: also without a score")
MAX_CORRUPT = flags.DEFINE_float("max_corrupt", 0.01, "share of corrupt samples that are passed over")


def main(argv):
    del argv
    from fid_imagegen.data.webdataset import prepare

    filters = Filters(
        min_side=MIN_SIDE.value,
        max_side=MAX_SIDE.value,
        max_punsafe=MAX_PUNSAFE.value,
        max_pwatermark=MAX_PWATERMARK.value,
        min_aesthetic=MIN_AESTHETIC.value,
    )
    tars = [Path(name) for name in sorted(glob.glob(TARS.value))]
    report = prepare(tars, Path(OUT.value), filters, max_corrupt=MAX_CORRUPT.value)
    lines = {"kept": report["kept"], **report["dropped"], "corrupt": len(report["corrupt"])}
    print(f"{report['read']} samples of {len(tars)} tars")
    print("\n".join(f"{count:>12}  {reason}" for reason, count in lines.items()))
    for found in report["corrupt"]:
        print(f"corrupt: {found['name']}: {found['reason']}")
    print(f"prepared: {OUT.value}")


if __name__ == "__main__":
    command.run(main)
