"""What every objective is given, what one may say of itself, and how two answers on one noisy path are compared."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion.distances import Distance
from fid_imagegen.diffusion.noise import NoiseRange, example_normal
from fid_imagegen.diffusion.preconditioning import Net, Preconditioning, consistency_function, per_image

Images = Float[Array, "batch height width channels"]
Levels = Float[Array, "batch"]


STEEPEST_LEVEL = 16.0  # radians a unit of level, as much as Fourier features of scale 2.5


class Own(NamedTuple):
    """A group of parameters that an objective trains beside the network: init(key) makes it, apply(group, ...) is its net."""

    init: Callable[[Key[Array, ""]], Any]
    apply: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """num_steps: of the whole training, for schedules over it. draw: noise of draw(keys, shape)."""

    noise: NoiseRange
    form: Preconditioning
    distance: Distance
    num_steps: int
    draw: Callable = dataclasses.field(default=example_normal, kw_only=True)

    target_decay = None  # decay(step) of the tracked copy nets["target"], where there is one
    needs_teacher = False  # nets["teacher"], a frozen denoiser
    any_distance = True  # False: the square, by its mathematics
    differentiates_level = False  # networks whose embedding of the level is steep make its derivative noise
    own = {}  # name: Own, of each group of its own
    sampler = "consistency"  # which of `samplers.SAMPLERS` makes images of what it trained
    sampling_steps = 1

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Its own groups."""
        return {name: own.init(key) for name, own in self.own.items()}

    def nets(self, groups: dict[str, Any]) -> dict[str, Callable[..., Array]]:
        """Its own groups as it is given them, by name among the nets."""
        return {name: functools.partial(own.apply, groups[name]) for name, own in self.own.items()}

    def f(self, net: Net, x: Images, sigma_B: Levels, cond: Array | None, *, key: Key[Array, ""] | None) -> Images:
        """The consistency function of a net."""
        return consistency_function(net, x, sigma_B, cond, key=key, noise=self.noise, form=self.form)

    def compared(
        self,
        student: Net,
        target: Net,
        ahead: tuple[Images, Levels],
        behind: tuple[Images, Levels],
        cond: Array | None,
        *,
        key: Key[Array, ""],
    ) -> Levels:
        """d(f(ahead), stop_gradient f-(behind)), each an (image, level): the SAME dropout and jitter on both sides."""
        found, wanted = self.f(student, *ahead, cond, key=key), self.f(target, *behind, cond, key=key)
        return self.distance(found, jax.lax.stop_gradient(wanted))

    def pair_distance(
        self,
        student: Net,
        target: Net,
        x0: Images,
        cond: Array | None,
        sigma_B: Levels,
        lower_B: Levels,
        *,
        keys: Key[Array, "batch"],
        key: Key[Array, ""],
    ) -> Levels:
        """`compared` at x0 + sigma z and x0 + lower z, the SAME z: Euler's step with the true x0."""
        z = self.draw(keys, x0.shape[1:])
        ahead, behind = ((x0 + per_image(level_B) * z, level_B) for level_B in (sigma_B, lower_B))
        return self.compared(student, target, ahead, behind, cond, key=key)
