"""What every objective is given, and what one may say of itself."""

import dataclasses
from collections.abc import Callable

from fid_imagegen.diffusion.distances import Distance
from fid_imagegen.diffusion.noise import NoiseRange, example_normal
from fid_imagegen.diffusion.preconditioning import Preconditioning


@dataclasses.dataclass(frozen=True)
class Objective:
    """num_steps: of the whole training, for schedules over it."""

    noise: NoiseRange
    form: Preconditioning
    distance: Distance
    num_steps: int
    draw: Callable = dataclasses.field(default=example_normal, kw_only=True)  # noise of draw(keys, shape)

    target_decay = None  # decay(step) of the tracked copy nets["target"], where there is one
    needs_teacher = False  # nets["teacher"], a frozen denoiser
    any_distance = True  # False: the square, by its mathematics
    differentiates_level = False  # networks whose embedding of the level is steep make its derivative noise
    sampler = "consistency"  # which of `samplers.SAMPLERS` makes images of what it trained
    sampling_steps = 1
