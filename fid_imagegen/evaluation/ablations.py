"""The paper's ablations: what each condition and each setting of sampling does to pictures of the same prompts and seed."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8

from fid_imagegen.evaluation.shapes import score
from fid_imagegen.pipelines import LatentDiffusionPipeline, WuerstchenPipeline
from fid_imagegen.pipelines.text import Images, Latents, Stage

GUIDANCE = (1.0, 2.0, 4.0, 8.0)
STEPS = (2, 4, 8, 16, 32, 64)


class Pictures(NamedTuple):
    """The pictures of all prompts under one setting of one ablation."""

    ablation: str
    setting: str
    images: Images


def wuerstchen_ablations(
    pipe: WuerstchenPipeline, previewer: Callable[[Latents], Images] | None, prompts: list[str], seed: int
) -> Iterator[Pictures]:
    """First the pictures as trained; then without text or latents, past Stages B and A, and sweeps of guidance and steps."""
    latents_of, decode = (functools.partial(method, seed=seed) for method in (pipe.latents, pipe.decode))
    nothing, latents = [""] * len(prompts), latents_of(prompts)
    untold = latents_of(nothing)
    yield Pictures("", "as trained", decode(prompts, latents))
    yield Pictures("text", "none in C", decode(prompts, untold))
    if pipe.stage_b.task.text.used:
        yield Pictures("text", "none in B", decode(nothing, latents))
        yield Pictures("text", "none at all", decode(nothing, untold))
    yield Pictures("latents", "none in B", decode(prompts, jnp.zeros_like(latents)))
    if previewer:
        yield Pictures("previewer", "previewed", previewer(latents))
    for name, value, sampling in _sweeps():
        yield Pictures(f"prior_{name}", value, decode(prompts, latents_of(prompts, **sampling)))
    for name, value, sampling in _sweeps():
        yield Pictures(f"decoder_{name}", value, decode(prompts, latents, **sampling))


def baseline_ablations(pipe: LatentDiffusionPipeline, prompts: list[str], seed: int) -> Iterator[Pictures]:
    """First the pictures as trained; then without text, and sweeps of guidance and steps."""
    draw = functools.partial(pipe, seed=seed, progress=False)
    yield Pictures("", "as trained", draw(prompts))
    yield Pictures("text", "none", draw([""] * len(prompts)))
    for name, value, sampling in _sweeps():
        renamed = {"scale": "guidance_scale", "steps": "num_inference_steps"}
        yield Pictures(name, value, draw(prompts, **{renamed[key]: number for key, number in sampling.items()}))


def _sweeps() -> Iterator[tuple[str, str, dict]]:
    for scale in GUIDANCE:
        yield "guidance", f"{scale:g}", {"scale": scale}
    for steps in STEPS:
        yield "steps", f"{steps}", {"steps": steps}


def load_previewer(folder: epath.Path, pipe: WuerstchenPipeline) -> Callable[[Latents], Images]:
    """Stage C's latents -> what the previewer in `folder` makes of them, enlarged to the size of the pictures."""
    stage, size = Stage(folder), pipe.stage_b.config.data.image_size
    stats = {"compressor_stats": pipe.stage_b.groups["compressor_stats"]}

    @jax.jit
    def enlarged(groups, latents):
        made = stage.task.decode(groups, latents)
        return jax.image.resize(made, (len(made), size, size, made.shape[3]), "bilinear")

    return lambda latents: np.round(255 * np.asarray(enlarged(stage.groups | stats, latents))).astype(np.uint8)


def measure(images: Images, as_trained: Images, scenes: list | None) -> dict:
    """{"psnr": in dB against the pictures as trained, None for the same pixels, "alignment": with scenes, if there are any}."""
    found = {"psnr": psnr(images, as_trained)}
    return found | ({"alignment": score(images, scenes)} if scenes else {})


def psnr(images: UInt8[np.ndarray, "..."], others: UInt8[np.ndarray, "..."]) -> float | None:
    """Peak signal-to-noise ratio of the whole batch in dB; None for equal pictures, whose ratio has no end."""
    error = np.mean((images.astype(np.float64) - others) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else None
