"""Text to image in three stages.

pipe = WuerstchenPipeline.from_pretrained("runs/demo-text")
images = pipe("a red star at the top left", height=64, width=64, seed=0)       # uint8 [1, 64, 64, 3]
"""

import functools
import math
from collections.abc import Sequence

import jax
from etils import epath
from tqdm import tqdm

from fid_imagegen.pipelines.text import (
    Images,
    ImageStage,
    Latents,
    Stage,
    checked_size,
    listed,
    listed_negative,
    padded,
    timed,
)

Size = tuple[int, int]


class WuerstchenPipeline:
    """Stage C (text to compressor latents), Stage B (to Stage A's latents) and Stage A's decoder."""

    def __init__(self, stage_a: Stage, stage_b: ImageStage, stage_c: Stage):
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
    def from_pretrained(
        cls, folder: epath.PathLike, prior: str = "stage_c", decoder: str = "stage_b"
    ) -> "WuerstchenPipeline":
        """Loads FOLDER/{stage_a,stage_b,stage_c}: work directories, or what `fid_imagegen.convert` wrote.

        prior, decoder: the folders that stand for stage_c and stage_b, such as stage_c_jumps and stage_b_jumps, their twins of a
        few steps.
        Raises FileNotFoundError naming what is not there.
        """
        folder = epath.Path(folder)
        return cls(Stage(folder / "stage_a"), ImageStage(folder / decoder), Stage(folder / prior))

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
    ) -> Images:
        """Images of prompts, those of one prompt together; image i depends on (seed, i), its prompt and the settings alone.

        height, width: pixels, default Stage B's training size. The network works in steps of `step` pixels: other sizes are made
        larger inside and cropped to what was asked for, at the bottom and right. Steps and guidance default to the config's; a
        guidance scale of 1 means none. Stage B, where it reads text, is given the negative prompt too.

        Raises TypeError for a prompt that is no string, ValueError for sizes, counts or steps that cannot be.
        """
        prompts = listed(prompt, num_images_per_prompt)
        negative = listed_negative(negative_prompt, len(prompts), num_images_per_prompt)
        shared = {"negative": negative, "size": self._size(height, width), "seed": seed}
        prior_steps, steps = self.stage_c.steps(prior_num_inference_steps), self.stage_b.steps(num_inference_steps)
        with tqdm(total=prior_steps + steps, desc="Stage C", disable=not progress) as bar:
            shared["advanced"] = bar.update
            latents = self.latents(prompts, steps=prior_steps, scale=prior_guidance_scale, **shared)
            bar.set_description("Stage B")
            return self.decode(prompts, latents, steps=steps, scale=decoder_guidance_scale, **shared)

    def latents(
        self,
        prompts: list[str],
        *,
        negative: list[str] | None = None,
        size: Size | None = None,
        seed: int = 0,
        **sampling,
    ) -> Latents:
        """Stage C: the compressor's latents, one image a prompt, of images of `size` (height, width).

        sampling: `steps`, `scale` and `advanced` of `Stage.sample`.
        """
        stage, whole = self.stage_c, padded(*(size or self._size()), self.step)
        arguments = (stage.task, stage.groups, *stage.tokens(prompts), stage.negative(negative))
        shape = (*(side // self.stage_b.task.stride for side in whole), stage.config.compressor.channels)
        key, condition = jax.random.key(seed), lambda scale: _condition(*arguments, scale)
        with timed(self.seconds, "stage_c"):
            made = stage.sample(condition, key, len(prompts), shape, **sampling)
        return stage.task.unscaled(stage.groups, made)

    def decode(
        self,
        prompts: list[str],
        latents: Latents,
        *,
        negative: list[str] | None = None,
        size: Size | None = None,
        seed: int = 0,
        **sampling,
    ) -> Images:
        """Stages B and A: images of `size` of what `latents` gave for it; the rest is as there."""
        size, key = size or self._size(), jax.random.fold_in(jax.random.key(seed), 1)
        whole = padded(*size, self.step)
        with timed(self.seconds, "stage_b"):
            made = self.stage_b.denoise(prompts, latents, key, negative=negative, size=whole, **sampling)
        with timed(self.seconds, "stage_a"):
            return self.stage_b.images(made, *size)

    @property
    def step(self) -> int:
        """Pixels by which sizes change inside: what Stage B's U-net and the compressor's stride have in common."""
        # A fraction's whole multiples are those of its numerator.
        return math.lcm(self.stage_b.step, self.stage_b.task.stride.numerator)

    def _size(self, height: int | None = None, width: int | None = None) -> Size:
        return checked_size(height, width, self.stage_b.config.data.image_size, self.step)


@functools.partial(jax.jit, static_argnums=0)
def _condition(task, groups, tokens, mask, without, scale):
    return task.condition(groups, tokens, mask, without, scale)
