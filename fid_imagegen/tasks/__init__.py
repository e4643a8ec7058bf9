"""What can be trained: a model, an objective and the batch keys they use. `tasks.build(config)` is the only constructor."""

from fid_imagegen.tasks.consistency import ConsistencyTask
from fid_imagegen.tasks.reconstruction import ReconstructionTask

TASKS = {"consistency": ConsistencyTask, "reconstruction": ReconstructionTask}


def build(config):
    """The task of a resolved config. ValueError names what is unknown or does not fit."""
    if config.task not in TASKS:
        raise ValueError(f"found task {config.task!r}, expected one of {sorted(TASKS)}; change config.task")
    return TASKS[config.task](config)
