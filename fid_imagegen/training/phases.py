"""The phases of a config, one after the other.

A generator of image functions pre-trains by reconstruction into WORKDIR/pretrain where its config asks for it. A config with
`stages` holds one whole config under each of their names, each trained into WORKDIR/STAGE and free to start from those before.
"""

from etils import epath
from ml_collections import ConfigDict

from fid_imagegen import tasks
from fid_imagegen.data import pipeline, sources
from fid_imagegen.tasks.reconstruction import rendered_psnr
from fid_imagegen.tasks.text import GROUP
from fid_imagegen.training import optimizer, runs, warm_start
from fid_imagegen.training.loop import Evaluator, Run, train
from fid_imagegen.training.warm_start import PRETRAIN

MAX_HELD_OUT = 512


def run(config: ConfigDict, workdir: epath.PathLike) -> bool:
    """Runs all phases of a config, resuming what is there; False if asked to stop before the end."""
    if "stages" in config:
        for stage in config.stages:
            check(config[stage], epath.Path(workdir) / stage)
        return all(run(config[stage], epath.Path(workdir) / stage) for stage in config.stages)
    if "pretrain" not in config or not config.pretrain.num_steps:
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
    if not train(phase, epath.Path(workdir) / PRETRAIN, evaluators=held_out_psnr(phase.data)):
        return False
    return train(config, workdir)


def check(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises for a stage's mistakes, missing data and weights before an earlier stage has run for days."""
    task, source = tasks.build(config), sources.make_source(config.data)
    optimizer.build_all(config, task.trained)
    frozen = task.frozen()
    warm_start.check_names(dict(config.init), frozen | dict.fromkeys(task.trained))
    if GROUP in frozen:  # a tokenizer of the stage's own is trained when its turn comes
        task.tokenizer(source, workdir / runs.TOKENIZER)
    if hasattr(task, "pretrained") and not (workdir / "config.json").exists():
        task.pretrained()


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The config of the reconstruction phase of `config`."""
    phase = ConfigDict(config.to_dict())
    phase.task = "reconstruction"
    phase.num_steps, phase.batch_size = config.pretrain.num_steps, config.pretrain.batch_size
    phase.accumulate, phase.optimizers = config.pretrain.accumulate, config.pretrain.optimizers
    phase.checkpoint.every = phase.log.sample_every = config.pretrain.checkpoint_every
    phase.pretrain.num_steps = 0
    phase.init.update(dict.fromkeys(phase.init, ""))  # what the second phase starts from
    return phase.lock()


def held_out_psnr(data: ConfigDict) -> tuple[Evaluator, ...]:
    """The evaluator of a reconstruction run; none where nothing is held out."""
    if not data.holdout_every:
        return ()
    source = sources.make_source(data, held_out=True)
    images = pipeline.examples(source, data, range(min(MAX_HELD_OUT, len(source))))
    return (lambda task, params: {"held_out_psnr": rendered_psnr(task, params, images)},)
