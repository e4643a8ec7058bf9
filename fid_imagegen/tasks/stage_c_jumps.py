"""Stage C in one to four steps: distilled, or tuned, into a consistency function on its own path.

The cosine path is TrigFlow's for latents of unit deviation: x_t = cos u x0 + sin u eps with cos^2 u = alpha_bar(t), and minus the
velocity is EDM's raw output. So every objective of images does for latents; a trained Stage C of form `v` is teacher and start.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion import cosine, guidance, objectives
from fid_imagegen.diffusion.distances import DISTANCES
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.preconditioning import preconditioning
from fid_imagegen.tasks.latent import chance, split, unit
from fid_imagegen.tasks.stage_c import StageCTask

# The cosine path's ends: alpha_bar of 0.9999 and of 0.0001.
NOISE = NoiseRange(sigma_min=0.01, sigma_max=99.99, sigma_data=1.0)
DISTANCE_NAMES = ("l2", "pseudo_huber")
# What teacher and student must share.
SHARED = ("latent_scale", "compressor", "text", "form")


class StageCJumpsTask(StageCTask):
    """Group `stage_c_jumps` is trained, a small text encoder is kept (rate 0); `teacher`, a Stage C of form `v`, is frozen."""

    group = "stage_c_jumps"

    def __init__(self, config):
        super().__init__(config)
        if "text" in self.trained and config.optimizers.text.learning_rate:
            raise ValueError(
                f"found a rate of {config.optimizers.text.learning_rate} for the text encoder, expected 0: the teacher reads "
                "it too, and weight decay moves what gets no gradient; set config.optimizers.text.learning_rate=0"
            )
        if config.form != "jump":
            raise ValueError(
                f"found form {config.form!r} for task 'stage_c_jumps', expected 'jump'; change config.form"
            )
        if config.distance not in DISTANCE_NAMES:
            raise ValueError(
                f"found distance {config.distance!r}, expected one of {DISTANCE_NAMES}; change config.distance"
            )
        fields = dict(config.objective)
        self.objective = objectives.build(
            fields.pop("name"),
            noise=NOISE,
            form=preconditioning("edm", "angle"),
            distance=DISTANCES[config.distance],
            num_steps=config.num_steps,
            **fields,
        )
        if self.objective.differentiates_level or self.objective.sampler != "consistency":
            raise ValueError(
                f"found objective {config.objective.name!r} for Stage C, expected one that compares two levels, such as 'cd' or "
                "'ect': Stage C's embedding multiplies the level by 10,000, which no derivative in it survives; change "
                "config.objective"
            )

    @property
    def tracked(self) -> dict:
        """The target's average where the objective has one."""
        decay = self.objective.target_decay
        return {} if decay is None else {"target": (self.group, decay)}

    def frozen(self) -> dict:
        """As Stage C's, and the shapes of a teacher."""
        if not self.objective.needs_teacher:
            return super().frozen()
        made = jax.eval_shape(lambda: self.init(jax.random.key(0))[0][self.group])
        return super().frozen() | {"teacher": made}

    @property
    def borrowed(self) -> dict:
        """Both are another run's `stage_c`."""
        return dict.fromkeys(("teacher", self.group), ("stage_c", self._check_start))

    def _check_start(self, theirs, folder: str) -> None:
        wanted = {name: self.config[name] for name in SHARED} | {"form": "v"}
        pairs = {name: (_plain(theirs.get(name)), _plain(wanted[name])) for name in SHARED}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if differing:
            found = "; ".join(f"{name} {there!r}, expected {here!r}" for name, (there, here) in differing.items())
            raise ValueError(f"found a Stage C in {folder} of {found}; start from another, or change this config")

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of a batch as Stage C's: (loss, (model_state, metrics))."""
        noise_key, net_key = jax.random.split(key)
        loss_key, drop_key = split(example_keys(noise_key, batch["row"]), 2)
        raw = batch["latents"] if "latents" in batch else self.compress(groups, unit(batch["image"]))
        x0, dropped = self.scaled(groups, raw), chance(drop_key, self.config.text_dropped)
        texts = tuple(self.text.features(groups, batch, where) for where in (dropped, jnp.ones_like(dropped)))
        names = {"student": self.group, "target": "target", "teacher": "teacher"}
        nets = {
            name: functools.partial(self._guided if name == "teacher" else self._net, groups[group])
            for name, group in names.items()
            if group in groups
        }
        loss_B, metrics = self.objective(
            nets, *jax.lax.stop_gradient((x0, texts)), keys=loss_key, key=net_key, step=step
        )
        return jnp.mean(loss_B), (model_state, metrics)

    def _net(self, params, x, levels_BK, texts, *, key, text: int = 0):
        """Minus the velocity at an angle, for the captions or, with `text` 1, for none."""
        model, t_B = self.denoiser.model, cosine.time_of_angle(levels_BK[:, 0])
        rngs = {"dropout": key} if key is not None else None
        output = model.apply({"params": params}, x, t_B, texts[text], key is None, rngs=rngs, method=model.end_to_end)
        return -output[0]

    def _guided(self, params, x, levels_BK, texts, *, key):
        labelled, null = (self._net(params, x, levels_BK, texts, key=key, text=text) for text in (0, 1))
        return guidance.lerp(null, labelled, self.config.teacher_guidance)


def _plain(value):
    """A config's value as its JSON file holds it: tuples are lists there."""
    return json.loads(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value))
