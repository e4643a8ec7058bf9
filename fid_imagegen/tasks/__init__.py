"""What can be trained: a model, an objective and the batch keys they use. `tasks.build(config)` is the only constructor."""

from fid_imagegen.tasks.consistency import ConsistencyTask
from fid_imagegen.tasks.reconstruction import ReconstructionTask
from fid_imagegen.tasks.stage_a import StageATask
from fid_imagegen.tasks.stage_b import StageBTask
from fid_imagegen.tasks.stage_c import StageCTask

TASKS = {
    "consistency": ConsistencyTask,
    "reconstruction": ReconstructionTask,
    "stage_a": StageATask,
    "stage_b": StageBTask,
    "stage_c": StageCTask,
}


def build(config):
    """The task of a resolved config. ValueError names what is unknown or does not fit."""
    if config.task not in TASKS:
        raise ValueError(f"found task {config.task!r}, expected one of {sorted(TASKS)}; change config.task")
    return TASKS[config.task](config)
