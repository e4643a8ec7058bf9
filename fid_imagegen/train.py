"""python -m fid_imagegen.train --config configs/x.py[:arg] --workdir DIR [--config.key=value ...]

Pre-trains where the config asks for it (into WORKDIR/pretrain), then trains. The same command resumes. Exit status 0 when done
or when asked to stop (SIGTERM, Ctrl-C) after saving.
"""

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where config.json, checkpoints, metrics and samples go", required=True)
DISTRIBUTED = flags.DEFINE_string(
    "distributed", "off", "off, auto (the cluster's own environment), or HOST:PORT of process 0"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "with --distributed=HOST:PORT")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "with --distributed=HOST:PORT")


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The config of the reconstruction phase of `config`."""
    phase = ConfigDict(config.to_dict())
    phase.task = "reconstruction"
    phase.num_steps, phase.batch_size = config.pretrain.num_steps, config.pretrain.batch_size
    phase.accumulate, phase.optimizers = config.pretrain.accumulate, config.pretrain.optimizers
    phase.checkpoint.every = phase.log.sample_every = config.pretrain.checkpoint_every
    phase.pretrain.num_steps, phase.init.generator = 0, ""
    return phase.lock()


def run(config: ConfigDict, workdir: str) -> bool:
    """All phases of a config; False if asked to stop before the end."""
    from fid_imagegen.evaluation.reconstruction import held_out_psnr
    from fid_imagegen.training.loop import Run, train
    from fid_imagegen.training.warm_start import PRETRAIN

    if not config.pretrain.num_steps:
        return train(config, workdir)
    if config.init.generator:
        raise ValueError(
            f"found config.init.generator={config.init.generator!r} together with "
            f"pretrain.num_steps={config.pretrain.num_steps}, expected one of the two; "
            "set config.pretrain.num_steps=0 to start from the given run"
        )
    config = ConfigDict(config.to_dict())
    config.init.generator = PRETRAIN
    # Mistakes in the second phase should show before the first one has run.
    Run(config.lock(), workdir).write_config()
    phase = pretrain_config(config)
    if not train(phase, f"{workdir}/{PRETRAIN}", evaluators=held_out_psnr(phase.data)):
        return False
    return train(config, workdir)


def initialize_distributed() -> None:
    """Joins the other processes; nothing is read from a scheduler's environment unless asked for with `auto`."""
    if DISTRIBUTED.value == "off":
        return
    if DISTRIBUTED.value == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(DISTRIBUTED.value, NUM_PROCESSES.value, PROCESS_ID.value)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(
            f"found arguments {argv[1:]}, expected flags only: --config, --workdir, --config.KEY=VALUE"
        )
    initialize_distributed()
    logging.info("%d process(es), devices: %s", jax.process_count(), jax.devices())
    finished = run(CONFIG.value, WORKDIR.value)
    if jax.process_index() == 0:
        print(f"{'finished' if finished else 'stopped and saved'}: {WORKDIR.value}")


if __name__ == "__main__":
    app.run(main)
