"""Training a generator by an objective of the consistency family, or by plain diffusion."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion import editing, objectives
from fid_imagegen.diffusion.distances import DISTANCES, Distance, unit_gradient
from fid_imagegen.diffusion.noise import NoiseRange, example_keys
from fid_imagegen.diffusion.objectives.objective import STEEPEST_LEVEL
from fid_imagegen.diffusion.preconditioning import consistency_function, flow_map, per_image, preconditioning
from fid_imagegen.diffusion.samplers import SAMPLERS
from fid_imagegen.interop.lpips import load_lpips
from fid_imagegen.models.features.augmentation_net import feature_distance
from fid_imagegen.models.features.lpips import lpips_distance
from fid_imagegen.models.image_function import Guided, ImageFunctions, NativeTerm
from fid_imagegen.tasks.augmentation import augmentation_net, init_augmentation_net
from fid_imagegen.tasks.borrowed import check_shared
from fid_imagegen.tasks.generator import (
    generator_net,
    image_functions,
    init_generator,
    render_native,
    to_float,
)
from fid_imagegen.tasks.networks import build_generator, grid_size
from fid_imagegen.tasks.windows import check_windows, draw_windows


class ConsistencyTask:
    """Group `generator` is trained, and what the objective has of its own; `target` tracks it where the objective asks; a teacher
    and a distance's net are frozen.
    """

    def __init__(self, config):
        check_windows(config)
        self.config = config
        self.noise = NoiseRange(**config.noise)
        self.form = preconditioning(config.preconditioning, config.time)
        self.model = build_generator(config)
        # The objective is built once here so that a config's mistakes show at once; LPIPS binds its weights per call.
        self.objective = self._objective(lambda a, b: jnp.zeros(a.shape[0]))
        self.trained = ("generator", *self.objective.own)
        self._check(config)
        if not 0 <= config.label_dropped <= 1:
            raise ValueError(
                f"found label_dropped {config.label_dropped}, expected a share from 0 to 1; change config.label_dropped"
            )
        if config.label_dropped and not config.model.num_classes:
            raise ValueError(
                f"found label_dropped {config.label_dropped} for a model without classes, expected 0; set model.num_classes"
            )

    def _check(self, config):
        name = config.objective.name
        known = (*DISTANCES, "augmentations", "lpips") if self.objective.any_distance else ("l2",)
        if config.distance not in known:
            raise ValueError(
                f"found distance {config.distance!r} for objective {name!r}, expected one of {sorted(known)}; "
                "change config.distance"
            )
        if self.objective.sampler == "consistency" and config.preconditioning == "mean_flow":
            raise ValueError(
                f"found preconditioning 'mean_flow' for objective {name!r}, which needs f(x, sigma_min) = x, expected "
                "'x0_blend' or 'edm'; change config.preconditioning"
            )
        fourier = getattr(self.model, "fourier_scale", None)
        steepness = 2 * math.pi * fourier if fourier else self.model.level_scale
        if self.objective.differentiates_level and steepness > STEEPEST_LEVEL:
            raise ValueError(
                f"found a level embedding of {steepness:.0f} radians a unit for objective {name!r}, which differentiates in the "
                f"noise level, expected at most {STEEPEST_LEVEL:.0f}; set config.model.level_scale=1, or "
                "config.model.unet.fourier_scale=0.02"
            )

    def _objective(self, distance, **more):
        fields = dict(self.config.objective) | more
        fields = {"name": fields.pop("name"), "num_steps": self.config.num_steps} | fields
        return objectives.build(noise=self.noise, form=self.form, distance=distance, **fields)

    @property
    def _augmentation_net(self):
        return augmentation_net(self.config.augmentation_net.widths, self.config.data.channels)

    def _distance(self, groups) -> Distance:
        """The distance of `config.distance`, bound to its weights."""
        if self.config.distance == "lpips":
            return functools.partial(lpips_distance, groups["lpips"])
        if self.config.distance == "augmentations":
            net = functools.partial(self._augmentation_net.apply, {"params": groups["augmentation_net"]})
            return unit_gradient(functools.partial(feature_distance, net))
        return DISTANCES[self.config.distance]

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
        """Frozen groups: LPIPS read from its files, an error names one that is missing; the shapes of what other runs trained."""
        frozen = {}
        if self.config.distance == "lpips":
            frozen["lpips"] = load_lpips(self.config.lpips.vgg16, self.config.lpips.heads)
        if self.config.distance == "augmentations":
            make = functools.partial(init_augmentation_net, self._augmentation_net, self.config.data)
            frozen["augmentation_net"] = jax.eval_shape(make, jax.random.key(0))
        if self.objective.needs_teacher:
            frozen["teacher"] = jax.eval_shape(lambda: self.init(jax.random.key(0))[0]["generator"])
        return frozen

    @property
    def borrowed(self) -> dict:
        """Groups that another run trained: name -> (its name there, check of that run's config)."""
        names = {"generator": "generator", "teacher": "generator", "augmentation_net": "augmentation_net"}
        return {group: (name, functools.partial(check_shared, group, self.config)) for group, name in names.items()}

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, model state)."""
        generator = init_generator(self.model, self.config, key, levels=len(self.form.times))
        return {"generator": generator} | self.objective.init(jax.random.fold_in(key, 1)), {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of a batch {"image": uint8 NHWC, "label": [B], "row": [B]}: (loss, (model_state, metrics))."""
        images, more, bind = to_float(batch["image"]), {}, self._net
        if self.config.grid:
            windows = draw_windows(self.config, jax.random.fold_in(key, 3))
            images, more = windows.clean(images), {"draw": windows.noise}
            bind = functools.partial(windows.net, self.model, chunk=self.config.render_chunk)
        names = {"student": "generator", "target": "target", "teacher": "teacher"}
        nets = {
            name: bind(groups[group], training=name != "teacher") for name, group in names.items() if group in groups
        }
        nets |= self.objective.nets(groups)
        noise_key, net_key = jax.random.split(key)
        loss_B, metrics = self._objective(self._distance(groups), **more)(
            nets,
            images,
            self._labels(batch, jax.random.fold_in(key, 2)),
            keys=example_keys(noise_key, batch["row"]),
            key=net_key,
            step=step,
        )
        return jnp.mean(loss_B), (model_state, metrics)

    def sample(
        self,
        params,
        key: Key[Array, ""],
        index_B: Int[Array, "batch"],
        *,
        steps: int | None = None,
        label_B=None,
        guidance=None,
    ) -> ImageFunctions:
        """Image functions number `index_B` of a seed's sequence: image i depends on (key, i), not on the batch around it.

        steps: of the objective's sampler, its own number if None. guidance: scale of classifier-free guidance, None without.
        """
        label_B = self._sample_labels(index_B, label_B)
        steps = self.objective.sampling_steps if steps is None else steps
        shape = (*2 * (grid_size(self.config),), self.config.data.channels)
        x, sigma_B = SAMPLERS[self.objective.sampler](
            self._denoise(params, label_B, guidance), example_keys(key, index_B), shape, steps=steps, noise=self.noise
        )
        return self._last(params, x, sigma_B, label_B, guidance)

    def edit(
        self,
        params,
        key: Key[Array, ""],
        index_B: Int[Array, "batch"],
        known: editing.Images,
        project: editing.Projection,
        *,
        steps: int,
        label_B=None,
    ) -> ImageFunctions:
        """Image functions of which the projection on the training grid is `known`; elsewhere it is interpolated."""
        label_B = self._sample_labels(index_B, label_B)
        keys, denoise = example_keys(key, index_B), self._denoise(params, label_B)
        x, sigma_B = editing.edit_input(denoise, known, project, keys, steps=steps, noise=self.noise)
        functions = self._last(params, x, sigma_B, label_B)
        made = render_native(functions, key=None, chunk=self.config.render_chunk)
        term = functions.native
        pixels = per_image(term.skip) * term.noisy + known - project(made)
        return functions.replace(native=term.replace(noisy=pixels, skip=jnp.ones_like(term.skip)))

    def _denoise(self, params, label_B, guidance=None):
        net = self._net(params["generator"], training=False)
        common = {"key": None, "noise": self.noise, "form": self.form}

        def denoise(*place):
            # Of two levels the second is the jump's end. A jump is affine in its velocity: to guide one is to guide the other.
            jump = functools.partial(consistency_function if len(place) == 2 else flow_map, net, *place, **common)
            labelled = jump(label_B)
            if guidance is None:
                return labelled
            null = jump(self._null(label_B))
            return null + guidance * (labelled - null)

        return denoise

    def _null(self, label_B):
        """The null class for every image."""
        if not self.config.label_dropped:
            raise ValueError(
                "found guidance for a model that never saw the null class, expected one trained with config.label_dropped > 0; "
                "leave guidance out"
            )
        return jnp.full_like(label_B, self.num_classes)

    def _last(self, params, x, sigma_B, label_B, guidance=None) -> ImageFunctions:
        """The last evaluation, of which the image function is kept."""
        levels_BK = self.form.levels(sigma_B, self.noise)
        scaled = per_image(self.form.c_in(sigma_B, self.noise)) * x
        make = functools.partial(image_functions, self.model, params["generator"], scaled, levels_BK)
        functions = make(label_B)
        if guidance is not None:
            both = {"labelled": functions.per_image, "null": make(self._null(label_B)).per_image}
            scale_B = jnp.full(x.shape[:1], guidance, jnp.float32)
            functions = functions.replace(kind=Guided(functions.kind), per_image=both | {"scale": scale_B})
        skip, out = self.form.c_skip(sigma_B, self.noise), self.form.c_out(sigma_B, self.noise)
        return functions.replace(native=NativeTerm(noisy=x, skip=skip, out=out))

    def preview(self, groups, batch) -> dict[str, Array]:
        """Samples on the native grid, as many as the batch has: {"samples": [count, height, width, channels]}."""
        functions = self.sample(groups, jax.random.key(0), jnp.arange(batch["image"].shape[0]))
        return {"samples": render_native(functions, key=None, chunk=self.config.render_chunk)}

    def _net(self, params, *, training: bool):
        return generator_net(
            self.model, params, training=training, variational=self.config.variational, chunk=self.config.render_chunk
        )

    def _labels(self, batch, key):
        """Labels of a batch, those that are dropped the null class; None without classes."""
        if not self.num_classes:
            return None
        drawn = jax.vmap(jax.random.uniform)(example_keys(key, batch["row"]))
        return jnp.where(drawn < self.config.label_dropped, self.num_classes, batch["label"])

    def _sample_labels(self, index_B, label_B):
        """Labels of a sample: the given ones, or all classes in turn."""
        if not self.num_classes:
            if label_B is not None:
                raise ValueError(
                    "found labels for a model without classes; leave labels out, or train with model.num_classes"
                )
            return None
        return index_B % self.num_classes if label_B is None else jnp.asarray(label_B, jnp.int32)
