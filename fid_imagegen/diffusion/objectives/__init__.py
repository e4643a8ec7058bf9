"""Training objectives, one a file, one signature:

    objective(nets, x0, cond, *, keys, key, step) -> (loss [batch], metrics {name: scalar})

`nets["student"]` receives gradients, `nets["target"]` is the tracked copy where the objective has one (`target_decay` is
not None), `nets["teacher"]` a frozen denoiser where it needs one (`needs_teacher`); groups that the objective itself trains are
there by name (`own`). `keys` are one key an example (noise, levels); `key` is shared by student and target (dropout, jitter).
"""

import dataclasses

from fid_imagegen.diffusion.objectives.cd import ConsistencyDistillation
from fid_imagegen.diffusion.objectives.ct import ConsistencyTraining
from fid_imagegen.diffusion.objectives.ect import EasyConsistencyTuning
from fid_imagegen.diffusion.objectives.edm import Diffusion
from fid_imagegen.diffusion.objectives.ict import ImprovedConsistencyTraining
from fid_imagegen.diffusion.objectives.mean_flow import MeanFlow
from fid_imagegen.diffusion.objectives.sct import ContinuousConsistencyTraining

OBJECTIVES = {
    "cd": ConsistencyDistillation,
    "ct": ConsistencyTraining,
    "ect": EasyConsistencyTuning,
    "edm": Diffusion,
    "ict": ImprovedConsistencyTraining,
    "meanflow": MeanFlow,
    "sct": ContinuousConsistencyTraining,
}


def build(name: str, **fields):
    """The named objective; ValueError lists the known names, or the fields that are another objective's."""
    if name not in OBJECTIVES:
        raise ValueError(f"found objective {name!r}, expected one of {sorted(OBJECTIVES)}")
    known = [field.name for field in dataclasses.fields(OBJECTIVES[name])]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(
            f"found {', '.join(unknown)} for objective {name!r}, which has none: they are another's; write all of "
            f"config.objective, as configs.common.objective({name!r}) does"
        )
    return OBJECTIVES[name](**fields)
