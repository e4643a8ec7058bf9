"""What tasks on latents share: a denoiser with a prediction form, its loss, and its one sampling path."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from fid_imagegen.data import buckets
from fid_imagegen.diffusion import cosine, guidance, targets
from fid_imagegen.diffusion.noise import example_keys, example_normal

Images = Float[Array, "batch height width channels"]
Shape = tuple[int, int, int]


class LatentDenoiser:
    """A Linen model with `condition`, `__call__(x, t_B, cond)` and `end_to_end`, trained and sampled by `form`.

    told: the range of guidance scales that the model is told of, as one more condition. Others mix two predictions.
    """

    def __init__(self, model: Any, form: str, told: tuple[float, float] | None = None):
        self.model, self.form, self.told = model, targets.form(form), told

    def loss(
        self, params: Any, x0: Images, conditions: tuple, *, keys_B: Key[Array, "batch"], key: Key[Array, ""]
    ) -> Float[Array, "batch"]:
        """The form's loss of every example, at a level and noise from its own key; `key` is for dropout."""
        level_B, noise_B = split(keys_B, 2)
        t_B, eps = self.form.times(level_B), example_normal(noise_B, x0.shape[1:])
        x = self.form.scale_input(self.form.add_noise(x0, eps, t_B), t_B)
        method = self.model.end_to_end
        output = self.model.apply({"params": params}, x, t_B, *conditions, False, rngs={"dropout": key}, method=method)
        return self.form.loss(output, x0, eps, t_B)

    def condition(self, params: Any, *conditions) -> Any:
        """All that does not depend on the noise level: computed once an image."""
        return self.model.apply({"params": params}, *conditions, method=self.model.condition)

    def guidance(self, scale: float) -> tuple[Array | None, Array | None]:
        """(What a task's `condition` is given of the scale, what `prediction` mixes by); 1 is none, unless it is told.

        ValueError for a scale that the model was never told of.
        """
        if self.told is None:
            mixed = None if scale == 1 else jnp.float32(scale)
            return mixed, mixed
        low, high = self.told
        if not low <= scale <= high:
            raise ValueError(
                f"found guidance {scale:g} for a model that is told its guidance, expected {low:g} to {high:g}, as in training; "
                "ask for another"
            )
        return jnp.float32(scale), None

    def mixes(self, scale: Array | None) -> bool:
        """Whether a task's `condition`, given this of `guidance`, is of 2 x batch."""
        return self.told is None and scale is not None

    def start(self, key: Key[Array, ""], index_B: Int[Array, "batch"], shape: Shape) -> Images:
        """The noise that sampling starts from; image i depends on (key, i), not on the batch around it."""
        return self.form.initial_deviation * self.noise(key, index_B, shape)(0)

    def noise(self, key: Key[Array, ""], index_B: Int[Array, "batch"], shape: Shape) -> cosine.Noise:
        """The noise of step i."""
        return cosine.keyed_noise(example_keys(key, index_B), shape)

    def prediction(self, params: Any, cond: Any, scale: Array | None) -> Callable[[Images, Array], Images]:
        """predict(x, t_B). With a guidance `scale`, `cond` is of 2 x batch: first those to follow, then those without."""

        def predict(x, t_B):
            output = self.model.apply({"params": params}, self.form.scale_input(x, t_B), t_B, cond)
            return self.form.predict(output, x, t_B)

        return predict if scale is None else guidance.guided(predict, scale)

    def advance(
        self, params: Any, cond: Any, x: Images, t: Array, t_next: Array, noise: Images, scale: Array | None
    ) -> Images:
        """One step of sampling, for a caller that reports progress."""
        return cosine.sample_step(self.prediction(params, cond, scale), self.form.step, x, t, t_next, noise)

    def sample(
        self,
        params: Any,
        cond: Any,
        key: Key[Array, ""],
        index_B: Int[Array, "batch"],
        shape: Shape,
        *,
        times: np.ndarray,
        scale: Array | None,
    ) -> Images:
        """Latents, all steps in one scan."""
        predict, start = self.prediction(params, cond, scale), self.start(key, index_B, shape)
        return cosine.sample(predict, self.form.step, start, times, self.noise(key, index_B, shape))

    def preview(
        self, params: Any, condition: Callable[[Array | None], Any], count: int, shape: Shape, sampling: ConfigDict
    ) -> Images:
        """`count` latents as `config.sampling` says; condition(scale) is the task's `cond`."""
        (given, mixed), times = self.guidance(sampling.guidance), cosine.sampling_times(sampling.steps)
        index = jnp.arange(count)
        return self.sample(params, condition(given), jax.random.key(0), index, shape, times=times, scale=mixed)


def module_fields(config: ConfigDict) -> dict[str, Any]:
    """A config's fields as a module takes them: tuples for the lists of a work directory, a dtype for its name."""
    fields = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in config.items()}
    return fields | {"dtype": jnp.dtype(fields["dtype"])}


def split(keys_B: Key[Array, "batch"], count: int) -> Key[Array, "count batch"]:
    """`count` keys for every example."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys_B), 0, 1)


def chance(keys_B: Key[Array, "batch"], probability: float) -> Bool[Array, "batch"]:
    """True with `probability`, for each example by its own key."""
    return jax.vmap(jax.random.uniform)(keys_B) < probability


def unit(images: Array) -> Float[Array, "batch height width channels"]:
    """uint8 0..255 -> float32 [0, 1]: what Stage A and the compressors read."""
    return images.astype(jnp.float32) / 255


def compressor_ratio(config) -> Fraction:
    """What the compressor sees of an image, along each side. ValueError for a bucket of which it sees no whole pixels."""
    seen, size = config.compressor.size, config.data.image_size
    ratio = Fraction(seen, size)
    buckets.check_multiples(config.data, ratio.denominator, f"of {size} pixels the compressor sees {seen}")
    return ratio


def resized(images: Images, ratio: Fraction) -> Images:
    """Both sides times `ratio`, antialiased bilinear as the authors' preprocessing; the same object for a ratio of 1."""
    if ratio == 1:
        return images
    batch, *sides, channels = images.shape
    return jax.image.resize(
        images, (batch, *(int(side * ratio) for side in sides), channels), "bilinear", antialias=True
    )


def beside(images: Images, made: Images) -> Images:
    """Each image, then what was made for it, [0, 1] -> [-1, 1]: a preview of [2 batch, height, width, channels]."""
    return 2 * rearrange([images, made], "pair b h w c -> (b pair) h w c") - 1


def variables(groups: Mapping, name: str) -> dict:
    """The Linen variables of a group: its parameters, and the BatchNorm statistics that came with it."""
    return {"params": groups[name]} | groups.get(f"{name}_stats", {})
