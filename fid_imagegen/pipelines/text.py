"""What text-to-image pipelines share: stages as they were trained, what may be asked of them, and the loop over their steps."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key, UInt8

from fid_imagegen import tasks
from fid_imagegen.data.tokenizer import Tokenizer, load_tokenizer, strings
from fid_imagegen.diffusion import cosine
from fid_imagegen.training.runs import read_params
from fid_imagegen.training.warm_start import inside

MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000

Latents = Float[Array, "batch rows columns channels"]
Images = UInt8[np.ndarray, "batch height width channels"]


class Stage:
    """One stage as it was trained: its task, its groups and its tokenizer."""

    def __init__(self, folder: epath.Path):
        self.config, self.groups = read_params(folder)
        texted = "text" in self.config
        if texted and self.config.text.weights:
            self.config.text.weights = str(inside(self.config.text.weights, folder))
        self.task = tasks.build(self.config)
        if texted:
            self.groups |= self.task.text.frozen()
        self.groups = jax.device_put(self.groups)  # once, not with every step
        saved = folder / "tokenizer.json"
        self.tokenizer: Tokenizer | None = load_tokenizer(saved) if saved.exists() else None

    def tokens(self, texts: Sequence[str]) -> tuple[Array, Array] | tuple[None, None]:
        """(tokens, mask) of texts, (None, None) for a stage without text."""
        return (None, None) if self.tokenizer is None else self.tokenizer(texts)

    def negative(self, texts: Sequence[str] | None) -> tuple[Array, Array] | None:
        """(tokens, mask) of what not to show; None where there are none, or no text. ValueError where guidance mixes nothing."""
        if texts is None or self.tokenizer is None:
            return None
        if self.task.denoiser.told:
            raise ValueError(
                f"found a negative prompt for {self.config.task}, which is told its guidance and mixes nothing, expected none; "
                "leave it out"
            )
        return self.tokens(texts)

    def steps(self, asked: int | None) -> int:
        """Sampling steps: the config's, if none are asked for. ValueError for numbers that cannot be."""
        steps = self.config.sampling.steps if asked is None else asked
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"found {steps} sampling steps, expected 1 to {MAX_STEPS}")
        return steps

    def sample(
        self,
        condition: Callable[[Array | None], Any],
        key: Key[Array, ""],
        count: int,
        shape: tuple[int, int, int],
        *,
        steps: int | None = None,
        scale: float | None = None,
        advanced: Callable[[int], Any] = lambda done: None,
    ) -> Latents:
        """`count` latents of `shape`, step by step so that progress can be told; condition(scale) is the task's `cond`.

        steps, guidance scale (1 means none): the config's where None. `advanced` is told of every step that is done.
        """
        denoiser, params, index = self.task.denoiser, self.groups[self.config.task], jnp.arange(count)
        given, mixed = denoiser.guidance(self.config.sampling.guidance if scale is None else scale)
        cond = condition(given)
        times, noise = cosine.sampling_times(self.steps(steps)), denoiser.noise(key, index, shape)
        x = denoiser.start(key, index, shape)
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True), start=1):
            x = _advance(denoiser, params, cond, x, jnp.float32(t), jnp.float32(t_next), noise(i), mixed)
            x.block_until_ready()  # so that the bar tells what is done, not what is queued
            advanced(1)
        return x


class ImageStage(Stage):
    """A stage that denoises the latents of a first stage, which makes images of them: Stage B, or an LDM."""

    @property
    def step(self) -> int:
        """Pixels by which the sizes that the network takes change."""
        return self.task.first_stage.stride * self.task.denoiser.model.step

    def denoise(
        self,
        prompts: list[str],
        latents: Latents | None,
        key: Key[Array, ""],
        *,
        negative: list[str] | None,
        size: tuple[int, int],
        **sampling,
    ) -> Latents:
        """The first stage's latents of images of `size`, for prompts and the compressor's latents, if the stage reads them.

        sampling: `steps`, `scale` and `advanced` of `sample`.
        """
        first = self.task.first_stage
        rows = tuple(side // first.stride for side in size)
        without = self.negative(negative)
        arguments = (self.task, self.groups, latents, *self.tokens(prompts), without, rows)
        shape = (*rows, first.channels)
        return self.sample(lambda scale: _condition(*arguments, scale), key, len(prompts), shape, **sampling)

    def images(self, latents: Latents, height: int, width: int) -> Images:
        """The first stage's latents -> images, cropped at the bottom and right."""
        made = np.asarray(self._decode(self.groups, latents))
        return np.round(255 * made[:, :height, :width]).astype(np.uint8)

    @functools.cached_property
    def _decode(self):
        return jax.jit(self.task.first_stage.decode)


def listed(prompt: str | Sequence[str], count: int) -> list[str]:
    """`count` times each prompt, those of one prompt together. TypeError for one that is no string, ValueError for none."""
    prompts = strings([prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else prompt)
    if not prompts or count < 1:
        raise ValueError(f"found {len(prompts)} prompts, {count} images each, expected at least one; give a prompt")
    return [text for text in prompts for _ in range(count)]


def listed_negative(prompt: str | Sequence[str] | None, total: int, count: int) -> list[str] | None:
    """As `listed`, for `total` images: one for all prompts, or one each."""
    if prompt is None:
        return None
    texts = listed(prompt, count)
    if len(texts) not in (count, total):
        raise ValueError(
            f"found {len(texts) // count} negative prompts for {total // count} prompts, expected one, or one each"
        )
    return texts if len(texts) == total else texts * (total // count)


def checked_size(height: int | None, width: int | None, trained: int, step: int) -> tuple[int, int]:
    """(height, width), the training size where None. ValueError for images that are smaller than a step, or too large."""
    height, width = (trained if side is None else side for side in (height, width))
    if min(height, width) < step or height * width > MAX_PIXELS:
        raise ValueError(
            f"found height {height} and width {width}, expected at least {step} each and at most {MAX_PIXELS:,} pixels; "
            "ask for another size"
        )
    return height, width


def padded(height: int, width: int, step: int) -> tuple[int, int]:
    """The next size that is whole steps."""
    return tuple(-(-side // step) * step for side in (height, width))


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str):
    """Writes what the block took into `seconds`."""
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began


@functools.partial(jax.jit, static_argnums=0)
def _advance(denoiser, *arguments):
    return denoiser.advance(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _condition(task, groups, latents, tokens, mask, without, rows, scale):
    return task.condition(groups, latents, tokens, mask, without, rows, scale)
