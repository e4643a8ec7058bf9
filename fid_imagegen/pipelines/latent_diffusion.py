"""Text to image by one stage on a first stage's latents: Würstchen's baselines.

pipe = LatentDiffusionPipeline.from_pretrained("runs/text_only/stage_b")
images = pipe("a red star at the top left", height=64, width=64, seed=0)       # uint8 [1, 64, 64, 3]
"""

from collections.abc import Sequence

import jax
from etils import epath
from tqdm import tqdm

from fid_imagegen.pipelines.text import Images, ImageStage, checked_size, listed, listed_negative, padded, timed
from fid_imagegen.training import warm_start
from fid_imagegen.training.runs import read_config


class LatentDiffusionPipeline:
    """An LDM, or a Stage B on text alone, and the first stage whose latents it denoises."""

    def __init__(self, stage: ImageStage):
        self.stage = stage
        self.seconds: dict[str, float] = {}  # of the last call, by stage

    @classmethod
    def from_pretrained(cls, folder: epath.PathLike) -> "LatentDiffusionPipeline":
        """Loads the stage's work directory or exported folder, and the first stage from where its `config.init` says.

        Raises FileNotFoundError naming what is not there, ValueError for a run of another kind.
        """
        folder, config = epath.Path(folder), read_config(folder)
        if config.task not in ("ldm", "stage_b") or (config.task == "stage_b" and any(config.model.inject_effnet)):
            raise ValueError(
                f"found a run of task {config.task!r} in {folder}, expected an LDM or a Stage B on text alone; one with a "
                "compressor is loaded by WuerstchenPipeline"
            )
        stage = ImageStage(folder)
        frozen = warm_start.fill(stage.task.first_stage.frozen(), dict(config.init), folder)
        stage.groups |= jax.device_put(warm_start.whole(frozen))
        return cls(stage)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
    ) -> Images:
        """Images of prompts, those of one prompt together; everything is as with `WuerstchenPipeline`."""
        stage, prompts = self.stage, listed(prompt, num_images_per_prompt)
        negative = listed_negative(negative_prompt, len(prompts), num_images_per_prompt)
        size = checked_size(height, width, stage.config.data.image_size, stage.step)
        asked = {"negative": negative, "size": padded(*size, stage.step), "scale": guidance_scale}
        asked["steps"] = stage.steps(num_inference_steps)
        with tqdm(total=asked["steps"], disable=not progress) as bar, timed(self.seconds, stage.config.task):
            made = stage.denoise(prompts, None, jax.random.key(seed), advanced=bar.update, **asked)
        with timed(self.seconds, "first_stage"):
            return stage.images(made, *size)
