"""python -m fid_imagegen.features --config CONFIG[:arg] [--config.key=value ...] --workdir DIR --out DIR

What Stage C's frozen encoders make of every record, made once where training would make it in every epoch: the compressor's
latents, of the mirror image too where the config flips, and the features of every caption where a CLIP tower reads it.
Needs what Stage C starts from, WORKDIR/stage_b. Then train with the same config and --config.stage_c.data.features=OUT: features
of other data, weights or settings are refused. Stopped, the same command goes on.
"""

import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from fid_imagegen import command

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
flags.mark_flag_as_required("config")
STAGE = flags.DEFINE_string("stage", "stage_c", "the stage of the config")
WORKDIR = flags.DEFINE_string("workdir", None, "that of training", required=True)
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "pictures or captions encoded at once, on all devices together")


def make(config: ConfigDict, workdir: Path, out: Path, *, batch_size: int) -> int:
    """Writes the features of a stage, to be trained in `workdir`, to `out`; returns the number of records."""
    from fid_imagegen.training.features import make_features
    from fid_imagegen.training.loop import Run

    config = ConfigDict(config.to_dict())
    config.batch_size, config.accumulate, config.data.features = batch_size, 1, ""
    return make_features(Run(config.lock(), workdir), out)


def main(argv):
    del argv
    if STAGE.value not in CONFIG.value:
        raise ValueError(
            f"found no {STAGE.value!r} in the config, expected one of {CONFIG.value.get('stages', ())}; "
            "change --stage or --config"
        )
    began, out = time.monotonic(), Path(OUT.value)
    records = make(CONFIG.value[STAGE.value], Path(WORKDIR.value) / STAGE.value, out, batch_size=BATCH_SIZE.value)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{records} records, {size / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")
    print(f"features: {out}")


if __name__ == "__main__":
    command.run(main)
