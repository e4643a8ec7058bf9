"""Training a one-step generator of image functions by consistency (ct, ict, ect)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion import objectives
from fid_imagegen.diffusion.distances import DISTANCES
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.preconditioning import (
    c_in,
    c_noise,
    c_skip,
    consistency_function,
    per_image,
    preconditioning,
)
from fid_imagegen.diffusion.samplers import last_input
from fid_imagegen.interop.lpips import load_lpips
from fid_imagegen.models.features.lpips import lpips_distance
from fid_imagegen.models.image_function import ImageFunctions, NativeTerm
from fid_imagegen.tasks.generator import build_generator, generator_net, init_generator, render_native, to_float


class ConsistencyTask:
    """Group `generator` is trained, `target` tracks it where the objective asks, `lpips` is frozen where the distance does."""

    trained = ("generator",)

    def __init__(self, config):
        self.config = config
        self.model = build_generator(config)
        self.noise = NoiseRange(**config.noise)
        self.form = preconditioning(config.preconditioning)
        # The objective is built once here so that a config's mistakes show at once; LPIPS binds its weights per call.
        self.objective = self._objective(lambda a, b: jnp.zeros(a.shape[0]))
        if config.distance not in (*DISTANCES, "lpips"):
            raise ValueError(f"found distance {config.distance!r}, expected one of {sorted([*DISTANCES, 'lpips'])}")

    def _objective(self, distance):
        fields = dict(self.config.objective)
        fields = {"name": fields.pop("name"), "num_steps": self.config.num_steps} | fields
        return objectives.build(noise=self.noise, form=self.form, distance=distance, **fields)

    @property
    def tracked(self) -> dict[str, tuple[str, object]]:
        """Tracked groups: name -> (trained group it follows, decay(step))."""
        decay = self.objective.target_decay
        return {} if decay is None else {"target": ("generator", decay)}

    @property
    def num_classes(self) -> int:
        """Classes the data must have; 0 if labels are not used."""
        return self.config.model.num_classes

    def tokenizer(self, source, path) -> None:
        """No text."""

    def frozen(self) -> dict:
        """Frozen groups, read from their files; an error names a file that is missing."""
        if self.config.distance != "lpips":
            return {}
        return {"lpips": load_lpips(self.config.lpips.vgg16, self.config.lpips.heads)}

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, model state)."""
        return {"generator": init_generator(self.model, key)}, {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean consistency loss of a batch {"image": uint8 NHWC, "label": [B], "row": [B]}: (loss, (model_state, metrics))."""
        bind = functools.partial(self._net, training=True)
        nets = {"student": bind(groups["generator"])}
        if "target" in groups:
            nets["target"] = bind(groups["target"])
        if self.config.distance == "lpips":
            distance = functools.partial(lpips_distance, groups["lpips"])
        else:
            distance = DISTANCES[self.config.distance]
        noise_key, net_key = jax.random.split(key)
        loss_B, metrics = self._objective(distance)(
            nets,
            to_float(batch["image"]),
            self._labels(batch["label"]),
            keys=example_keys(noise_key, batch["row"]),
            key=net_key,
            step=step,
        )
        return jnp.mean(loss_B), (model_state, metrics)

    def sample(
        self, params, key: Key[Array, ""], index_B: Int[Array, "batch"], *, steps: int = 1, label_B=None
    ) -> ImageFunctions:
        """Image functions number `index_B` of a seed's sequence: image i depends on (key, i), not on the batch around it."""
        net = self._net(params["generator"], training=False)
        label_B = self._sample_labels(index_B, label_B)

        def denoise(x, sigma_B):
            return consistency_function(net, x, sigma_B, label_B, key=None, noise=self.noise, form=self.form)

        size, channels = self.model.image_size, self.model.kind.channels
        keys = example_keys(key, index_B)
        x, sigma_B = last_input(denoise, keys, (size, size, channels), steps=steps, noise=self.noise)
        functions = self.model.apply(
            {"params": params["generator"]}, per_image(c_in(sigma_B, self.noise)) * x, c_noise(sigma_B), label_B
        )
        skip, out = c_skip(sigma_B, self.noise), self.form.c_out(sigma_B, self.noise)
        return functions.replace(native=NativeTerm(noisy=x, skip=skip, out=out))

    def preview(self, groups, batch) -> dict[str, Array]:
        """Samples on the native grid, as many as the batch has: {"samples": [count, height, width, channels]}."""
        functions = self.sample(groups, jax.random.key(0), jnp.arange(batch["image"].shape[0]))
        return {"samples": render_native(functions, key=None, chunk=self.config.render_chunk)}

    def _net(self, params, *, training: bool):
        return generator_net(
            self.model, params, training=training, variational=self.config.variational, chunk=self.config.render_chunk
        )

    def _labels(self, label_B):
        return label_B if self.model.num_classes else None

    def _sample_labels(self, index_B, label_B):
        """Labels of a sample: the given ones, or all classes in turn."""
        if not self.model.num_classes:
            if label_B is not None:
                raise ValueError(
                    "found labels for a model without classes; leave labels out, or train with model.num_classes"
                )
            return None
        return index_B % self.model.num_classes if label_B is None else jnp.asarray(label_B, jnp.int32)
