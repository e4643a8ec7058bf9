"""python -m fid_imagegen.train --config configs/x.py[:arg] --workdir DIR [--config.key=value ...]

Pre-trains where the config asks for it (into WORKDIR/pretrain), then trains. The same command resumes. Exit status 0 when done
or when asked to stop (SIGTERM, Ctrl-C) after saving.
"""

import jax
from absl import flags, logging
from ml_collections import config_flags

from fid_imagegen import command

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string("workdir", None, "where config.json, checkpoints, metrics and samples go", required=True)
DISTRIBUTED = flags.DEFINE_string(
    "distributed", "off", "off, auto (the cluster's own environment), or HOST:PORT of process 0"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "with --distributed=HOST:PORT")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "with --distributed=HOST:PORT")


def initialize_distributed() -> None:
    """Joins the other processes; nothing is read from a scheduler's environment unless asked for with `auto`."""
    if DISTRIBUTED.value == "off":
        return
    if DISTRIBUTED.value == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(DISTRIBUTED.value, NUM_PROCESSES.value, PROCESS_ID.value)


def main(argv):
    del argv
    initialize_distributed()
    from fid_imagegen.training.phases import run

    logging.info("%d process(es), devices: %s", jax.process_count(), jax.devices())
    finished = run(CONFIG.value, WORKDIR.value)
    if jax.process_index() == 0:
        print(f"{'finished' if finished else 'stopped and saved'}: {WORKDIR.value}")


if __name__ == "__main__":
    command.run(main)
