"""Text to image in three stages.

pipe = WuerstchenPipeline.from_pretrained("runs/demo-text")
images = pipe("a red star at the top left", height=64, width=64, seed=0)       # uint8 [1, 64, 64, 3]
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, UInt8
from tqdm import tqdm

from fid_imagegen import tasks
from fid_imagegen.data.tokenizer import Tokenizer, load_tokenizer, strings
from fid_imagegen.diffusion import cosine
from fid_imagegen.tasks.latent import LatentDenoiser
from fid_imagegen.training.runs import read_params
from fid_imagegen.training.warm_start import inside

STAGES = ("stage_a", "stage_b", "stage_c")
MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000


class Stage:
    """One stage as it was trained: its task, its groups and its tokenizer."""

    def __init__(self, folder: epath.Path):
        self.config, self.groups = read_params(folder)
        if self.config.task != "stage_a" and self.config.text.weights:
            self.config.text.weights = str(inside(self.config.text.weights, folder))
        self.task = tasks.build(self.config)
        if self.config.task != "stage_a":
            self.groups |= self.task.text.frozen()
        self.groups = jax.device_put(self.groups)  # once, not with every step
        saved = folder / "tokenizer.json"
        self.tokenizer: Tokenizer | None = load_tokenizer(saved) if saved.exists() else None

    def tokens(self, texts: Sequence[str]) -> tuple[Array, Array] | tuple[None, None]:
        """(tokens, mask) of texts, (None, None) for a stage without text."""
        return (None, None) if self.tokenizer is None else self.tokenizer(texts)


class WuerstchenPipeline:
    """Stage C (text to compressor latents), Stage B (to Stage A's latents) and Stage A's decoder."""

    def __init__(self, stage_a: Stage, stage_b: Stage, stage_c: Stage):
        self.stage_b, self.stage_c = stage_b, stage_c
        self.stage_b.groups |= {name: stage_a.groups[name] for name in ("vqgan", "vqgan_stats")}
        if stage_c.config.latent_scale == "statistics":
            if "compressor_stats" not in stage_b.groups:
                raise ValueError(
                    "found no statistics of a compressor in stage_b, expected some for config.stage_c.latent_scale "
                    "'statistics'; convert with --compressor, or take 'published'"
                )
            self.stage_c.groups |= {"compressor_stats": stage_b.groups["compressor_stats"]}
        self.seconds: dict[str, float] = {}  # of the last call, by stage

    @classmethod
    def from_pretrained(cls, folder: epath.PathLike) -> "WuerstchenPipeline":
        """Loads FOLDER/{stage_a,stage_b,stage_c}: work directories, or what `fid_imagegen.convert` wrote.

        Raises FileNotFoundError naming what is not there.
        """
        return cls(*(Stage(epath.Path(folder) / stage) for stage in STAGES))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
    ) -> UInt8[np.ndarray, "batch height width channels"]:
        """Images of prompts, those of one prompt together; image i depends on (seed, i), its prompt and the settings alone.

        height, width: pixels, default the training size. The network works in steps of `step` pixels: other sizes are made
        larger inside and cropped to what was asked for, at the bottom and right. Steps and guidance default to the config's; a
        guidance scale of 1 means none.

        Raises TypeError for a prompt that is no string, ValueError for sizes, counts or steps that cannot be.
        """
        prompts = self._prompts(prompt, num_images_per_prompt)
        negative = (
            None if negative_prompt is None else self._negative(negative_prompt, len(prompts), num_images_per_prompt)
        )
        trained = self.stage_c.config.data.image_size
        height, width = (trained if size is None else size for size in (height, width))
        self._check_size(height, width)
        rows, columns = (-(-size // self.step) * self.step for size in (height, width))
        prior, decoder = self.stage_c.config.sampling, self.stage_b.config.sampling
        prior_steps = _steps(prior_num_inference_steps, prior.steps)
        decoder_steps = _steps(num_inference_steps, decoder.steps)
        key, index = jax.random.key(seed), jnp.arange(len(prompts))
        prior_scale = prior.guidance if prior_guidance_scale is None else prior_guidance_scale
        decoder_scale = decoder.guidance if decoder_guidance_scale is None else decoder_guidance_scale
        with tqdm(total=prior_steps + decoder_steps, desc="Stage C", disable=not progress) as bar:
            with self._timed("stage_c"):
                latents = self._prior(
                    prompts, negative, (rows, columns), key, index, prior_steps, prior_scale, bar.update
                )
            bar.set_description("Stage B")
            with self._timed("stage_b"):
                made = self._decoder(
                    prompts, latents, (rows, columns), key, index, decoder_steps, decoder_scale, bar.update
                )
        with self._timed("stage_a"):
            images = np.asarray(self._to_images(self.stage_b.groups, made))
        return np.round(255 * images[:, :height, :width]).astype(np.uint8)

    @property
    def step(self) -> int:
        """Pixels by which sizes change inside: what Stage B's U-net and the compressor's stride have in common."""
        model, vqgan = self.stage_b.config.model, self.stage_b.task.vqgan
        stride = self.stage_c.task.stride.numerator  # a fraction's whole multiples are those of its numerator
        return math.lcm(vqgan.stride * model.patch_size * 2 ** (len(model.c_hidden) - 1), stride)

    def _prior(self, prompts, negative, size, key, index, steps, scale, advanced):
        stage, guided = self.stage_c, scale != 1
        without = None if negative is None else stage.tokens(negative)
        cond = _condition_c(stage.task, stage.groups, *stage.tokens(prompts), without, guided)
        shape = (*(side // stage.task.stride for side in size), stage.config.compressor.channels)
        made = _sample(stage.task.denoiser, stage.groups["stage_c"], cond, key, index, shape, steps, scale, advanced)
        return stage.task.unscaled(stage.groups, made)

    def _decoder(self, prompts, latents, size, key, index, steps, scale, advanced):
        stage, guided = self.stage_b, scale != 1
        rows = tuple(side // stage.task.vqgan.stride for side in size)
        cond = _condition_b(stage.task, stage.groups, latents, *stage.tokens(prompts), rows, guided)
        shape, key = (*rows, stage.config.vqgan.latent_channels), jax.random.fold_in(key, 1)
        return _sample(stage.task.denoiser, stage.groups["stage_b"], cond, key, index, shape, steps, scale, advanced)

    @contextlib.contextmanager
    def _timed(self, stage: str):
        begin = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - begin

    @functools.cached_property
    def _to_images(self):
        return jax.jit(self.stage_b.task.decode)

    def _prompts(self, prompt, count: int) -> list[str]:
        prompts = strings([prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else prompt)
        if not prompts or count < 1:
            raise ValueError(f"found {len(prompts)} prompts, {count} images each, expected at least one; give a prompt")
        return [text for text in prompts for _ in range(count)]

    def _negative(self, negative, total: int, count: int) -> list[str]:
        texts = self._prompts(negative, count)
        if len(texts) not in (count, total):
            raise ValueError(
                f"found {len(texts) // count} negative prompts for {total // count} prompts, expected one, or one each"
            )
        return texts if len(texts) == total else texts * (total // count)

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < self.step or height * width > MAX_PIXELS:
            raise ValueError(
                f"found height {height} and width {width}, expected at least {self.step} each and at most {MAX_PIXELS:,} "
                "pixels; ask for another size"
            )


def _steps(asked: int | None, default: int) -> int:
    steps = default if asked is None else asked
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"found {steps} sampling steps, expected 1 to {MAX_STEPS}")
    return steps


def _sample(
    denoiser: LatentDenoiser, params, cond, key, index, shape, steps: int, scale: float, advanced: Callable[[int], Any]
) -> Array:
    """The denoiser's `advance` step by step, so that progress can be told."""
    times, noise = cosine.sampling_times(steps), denoiser.noise(key, index, shape)
    x, scale = denoiser.start(key, index, shape), None if scale == 1 else jnp.float32(scale)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True), start=1):
        x = _advance(denoiser, params, cond, x, jnp.float32(t), jnp.float32(t_next), noise(i), scale)
        x.block_until_ready()  # so that the bar tells what is done, not what is queued
        advanced(1)
    return x


@functools.partial(jax.jit, static_argnums=0)
def _advance(denoiser, *arguments):
    return denoiser.advance(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _condition_c(task, groups, tokens, mask, without, guided):
    return task.condition(groups, tokens, mask, without, guided=guided)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _condition_b(task, groups, latents, tokens, mask, rows, guided):
    return task.condition(groups, latents, tokens, mask, rows, guided=guided)
