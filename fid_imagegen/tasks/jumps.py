"""Stages B and C in one to four steps: distilled, or tuned, into consistency functions on their own path.

The cosine path is TrigFlow's for latents of unit deviation: x_t = cos u x0 + sin u eps with cos^2 u = alpha_bar(t), and minus the
velocity is the raw output F of f = cos u x_t + sin u F. So every objective of images does for latents; a trained stage of form
`v` is teacher and start.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion import cosine, guidance, objectives
from fid_imagegen.diffusion.distances import DISTANCES
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.objectives.objective import STEEPEST_LEVEL
from fid_imagegen.diffusion.preconditioning import TRIGFLOW, per_image
from fid_imagegen.models.wuerstchen.guidance import GuidanceEmbedding
from fid_imagegen.tasks.latent import chance, split, unit
from fid_imagegen.tasks.stage_b import StageBTask
from fid_imagegen.tasks.stage_c import StageCTask

# The cosine path's ends: alpha_bar of 0.9999 and of 0.0001.
NOISE = NoiseRange(sigma_min=0.01, sigma_max=99.99, sigma_data=1.0)
DISTANCE_NAMES = ("l2", "pseudo_huber")
OWN = ("dropout", "dtype", "remat", "unroll")  # fields of a model that need not be the teacher's
TEACHER, GUIDANCE = "teacher", "guidance"


class Jumps:
    """What the twins share; before the stage's own task among a class's bases. A class says

        stage: the task of its teacher and start.       shared: what their configs must agree in, beside the model.
        examples(groups, batch, keys_B): (x0, conditions to follow, those of nothing).

    Its group, `guidance` and what the objective has of its own are trained, what the stage trains beside it is kept (rate 0),
    `teacher` is frozen. The guidance scale is an input, of which the teacher's is drawn for every image.
    """

    def __init__(self, config):
        super().__init__(config)
        self._check_kept(config)
        _check_form(config)
        self.objective = _objective(config)
        width = self.compressor_channels or self.text.width
        self.embedding = GuidanceEmbedding(width)
        self.trained = (*self.trained, GUIDANCE, *self.objective.own)

    @property
    def told_guidance(self) -> tuple[float, float]:
        """The range of guidance scales."""
        return tuple(self.config.teacher_guidance)

    @property
    def tracked(self) -> dict:
        """The target's average where the objective has one."""
        decay = self.objective.target_decay
        return {} if decay is None else {"target": (self.group, decay)}

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """The stage's own, the embedding of the guidance scale, and the objective's own."""
        params, stats = super().init(key)
        made = self.embedding.init(jax.random.fold_in(key, 1), jnp.ones(1))
        return params | {GUIDANCE: made["params"]} | self.objective.init(jax.random.fold_in(key, 2)), stats

    def frozen(self) -> dict:
        """The stage's own, and the shapes of a teacher."""
        if not self.objective.needs_teacher:
            return super().frozen()
        return super().frozen() | {TEACHER: jax.eval_shape(lambda: self.init(jax.random.key(0))[0][self.group])}

    @property
    def borrowed(self) -> dict:
        """Both are another run's group of the stage."""
        return dict.fromkeys((TEACHER, self.group), (self.stage, self._check_start))

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of a batch as the stage's: (loss, (model_state, metrics))."""
        noise_key, net_key = jax.random.split(key)
        loss_key, data_key, scale_key = split(example_keys(noise_key, batch["row"]), 3)
        x0, follow, nothing = jax.lax.stop_gradient(self.examples(groups, batch, data_key))
        low, high = self.told_guidance
        scale_B = low + (high - low) * jax.vmap(jax.random.uniform)(scale_key)
        cond = {"told": self._told(groups, follow, scale_B), "follow": follow, "nothing": nothing, "scale": scale_B}
        names = {"student": self.group, "target": "target", "teacher": TEACHER}
        nets = {
            name: functools.partial(self._guided if name == "teacher" else self._student, groups[group])
            for name, group in names.items()
            if group in groups
        } | self.objective.nets(groups)
        loss_B, metrics = self.objective(nets, x0, cond, keys=loss_key, key=net_key, step=step)
        return jnp.mean(loss_B), (model_state, metrics)

    def conditioned(self, groups, conditions: tuple, *more):
        """`cond` of what the network is given beside its latents, the guidance scale among it: the last argument."""
        scale_B = jnp.broadcast_to(more[-1], next(len(each) for each in conditions if each is not None))
        return super().conditioned(groups, self._told(groups, conditions, scale_B), *more)

    def _told(self, groups, conditions: tuple, scale_B) -> tuple:
        """The scale is added to every token of the text, or to the compressor's latents where there are any."""
        place = next(i for i, each in enumerate(conditions) if each is not None)
        embedded = self.embedding.apply({"params": groups[GUIDANCE]}, scale_B)
        first = conditions[place]
        told = first + embedded.reshape(len(first), *(1,) * (first.ndim - 2), -1)
        return (*conditions[:place], told, *conditions[place + 1 :])

    def _student(self, params, x, levels_BK, cond, *, key):
        return self._net(params, x, levels_BK, cond["told"], key)

    def _guided(self, params, x, levels_BK, cond, *, key):
        follow, nothing = (self._net(params, x, levels_BK, cond[name], key) for name in ("follow", "nothing"))
        return guidance.lerp(nothing, follow, per_image(cond["scale"]))

    def _net(self, params, x, levels_BK, conditions, key):
        """Minus the velocity at an angle."""
        model, t_B = self.denoiser.model, cosine.time_of_angle(levels_BK[:, 0])
        rngs = {"dropout": key} if key is not None else None
        return -model.apply({"params": params}, x, t_B, *conditions, key is None, rngs=rngs, method=model.end_to_end)[0]

    def _check_kept(self, config):
        for group in self.trained:
            if group != self.group and (rate := config.optimizers[group].learning_rate):
                raise ValueError(
                    f"found a rate of {rate} for {group!r}, expected 0: the teacher reads it too, and weight decay moves what "
                    f"gets no gradient; set config.optimizers.{group}.learning_rate=0"
                )

    def _check_start(self, theirs, folder: str) -> None:
        model = [f"model.{field}" for field in self.config.model if field not in OWN]  # heads show in no shape
        wanted = {name: _at(self.config, name) for name in (*self.shared, *model)} | {"form": "v"}
        pairs = {name: (_at(theirs, name), wanted[name]) for name in wanted}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if differing:
            found = "; ".join(f"{name} {there!r}, expected {here!r}" for name, (there, here) in differing.items())
            raise ValueError(f"found a run in {folder} of {found}; start from another, or change this config")


class StageCJumpsTask(Jumps, StageCTask):
    """Text -> latents of the compressor, from a trained Stage C."""

    group, stage = "stage_c_jumps", "stage_c"
    shared = ("latent_scale", "compressor", "text")
    compressor_channels = 0  # among the conditions

    def examples(self, groups, batch, keys_B):
        """Scaled latents, texts, the empty text."""
        raw = batch["latents"] if "latents" in batch else self.compress(groups, unit(batch["image"]))
        dropped = chance(keys_B, self.config.text_dropped)
        texts = (self.text.features(groups, batch, where) for where in (dropped, jnp.ones_like(dropped)))
        return self.scaled(groups, raw), *((text,) for text in texts)


class StageBJumpsTask(Jumps, StageBTask):
    """The compressor's latents, and text -> Stage A's latents, from a trained Stage B; its compressor no longer learns."""

    group, stage = "stage_b_jumps", "stage_b"
    shared = ("latent_scale", "vqgan", "compressor", "text")

    @property
    def compressor_channels(self) -> int:
        return self.config.compressor.channels if self.uses_latents else 0

    def pretrained(self) -> dict:
        """Nothing: the compressor is the teacher's."""
        return {}

    def examples(self, groups, batch, keys_B):
        """Stage A's latents; the compressor's, disturbed as the teacher knows them, and texts; zeros and the empty text."""
        images, (drop_key, text_key) = unit(batch["image"]), split(keys_B, 2)
        latents = self.disturb(self.compress(groups, images), drop_key) if self.uses_latents else None
        text = self.dropped_text(groups, batch, text_key)
        nothing = None if text is None else self.text.features(groups, batch, jnp.ones(len(images), bool))
        zeros = None if latents is None else jnp.zeros_like(latents)
        return self.first_stage.encode(groups, images), (latents, text), (zeros, nothing)


def _check_form(config):
    if config.form != "jump":
        raise ValueError(f"found form {config.form!r} for task {config.task!r}, expected 'jump'; change config.form")
    if config.distance not in DISTANCE_NAMES:
        raise ValueError(
            f"found distance {config.distance!r}, expected one of {DISTANCE_NAMES}; change config.distance"
        )
    low, high = config.teacher_guidance
    if not 0 < low <= high:
        raise ValueError(
            f"found teacher_guidance {low} to {high}, expected a range of positive scales, such as (1.0, 4.0); change "
            "config.teacher_guidance"
        )


def _objective(config):
    """The objective of a config on the cosine path. ValueError for one that cannot be."""
    fields = dict(config.objective)
    common = {"noise": NOISE, "form": TRIGFLOW, "num_steps": config.num_steps}
    name = fields.pop("name")
    objective = objectives.build(name, distance=DISTANCES[config.distance], **common, **fields)
    if objective.sampler != "consistency":
        raise ValueError(
            f"found objective {name!r} for task {config.task!r}, expected one of the consistency family; change config.objective"
        )
    if not objective.needs_teacher and tuple(config.teacher_guidance) != (1, 1):
        raise ValueError(
            f"found teacher_guidance {tuple(config.teacher_guidance)} for objective {name!r}, which has no teacher, expected "
            "(1.0, 1.0); change config.teacher_guidance, or take 'cd'"
        )
    if objective.differentiates_level and config.model.level_scale > STEEPEST_LEVEL:
        raise ValueError(
            f"found a level embedding of {config.model.level_scale:.0f} radians a unit for objective {name!r}, which "
            f"differentiates in the noise level, expected at most {STEEPEST_LEVEL:.0f}; set config.model.level_scale=16, of the "
            "teacher too"
        )
    return objective


def _at(config, name: str):
    """The value of a dotted name as a JSON file holds it, tuples as lists; None where there is none."""
    for part in name.split("."):
        config = config.get(part, {})
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config)) or None
