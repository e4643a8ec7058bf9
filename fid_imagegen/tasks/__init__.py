"""What can be trained: a model, an objective and the batch keys they use. `tasks.build(config)` is the only constructor."""

from fid_imagegen.tasks.augmentation import AugmentationTask
from fid_imagegen.tasks.consistency import ConsistencyTask
from fid_imagegen.tasks.jumps import StageBJumpsTask, StageCJumpsTask
from fid_imagegen.tasks.ldm import LDMTask
from fid_imagegen.tasks.previewer import PreviewerTask
from fid_imagegen.tasks.reconstruction import ReconstructionTask
from fid_imagegen.tasks.stage_a import StageATask
from fid_imagegen.tasks.stage_b import StageBTask
from fid_imagegen.tasks.stage_c import StageCTask

TASKS = {
    "augmentation_net": AugmentationTask,
    "consistency": ConsistencyTask,
    "ldm": LDMTask,
    "previewer": PreviewerTask,
    "reconstruction": ReconstructionTask,
    "stage_a": StageATask,
    "stage_b": StageBTask,
    "stage_b_jumps": StageBJumpsTask,
    "stage_c": StageCTask,
    "stage_c_jumps": StageCJumpsTask,
}
BUCKETED = ("stage_b", "stage_b_jumps", "stage_c", "stage_c_jumps")  # what can train on pictures of several shapes


def build(config):
    """The task of a resolved config. ValueError names what is unknown or does not fit."""
    if config.task not in TASKS:
        raise ValueError(f"found task {config.task!r}, expected one of {sorted(TASKS)}; change config.task")
    if config.data.buckets and config.task not in BUCKETED:
        raise ValueError(
            f"found buckets {config.data.buckets} for task {config.task!r}, which trains on squares, expected none; set "
            "config.data.buckets=()"
        )
    return TASKS[config.task](config)
