"""What the stages of a Würstchen model hold and cost."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fid_imagegen.pipelines import WuerstchenPipeline
from fid_imagegen.tasks.first_stage import StageALatents


def parameter_table(pipe: WuerstchenPipeline) -> dict[str, int]:
    """Parameters by stage and group; statistics are not counted."""
    groups = {f"stage B: {name}": tree for name, tree in pipe.stage_b.groups.items()}
    groups |= {f"stage C: {name}": tree for name, tree in pipe.stage_c.groups.items()}
    counts = {name: _count(tree) for name, tree in groups.items() if not name.endswith("_stats")}
    renamed = {name.replace("stage B: vqgan", "stage A: vqgan"): count for name, count in counts.items()}
    return renamed | {"all": sum(renamed.values())}


def cost_table(pipe: WuerstchenPipeline, height: int | None, width: int | None) -> dict[str, float]:
    """FLOPs of one image by XLA's count on abstract shapes, 2 a multiply-add: one pass of each stage, and the whole sampling.

    Sizes default to the training size. Guidance doubles every pass. What is computed once an image, such as text encoders, is
    left out: it is small beside the passes.
    """
    size = pipe.stage_b.config.data.image_size
    rows, columns = (-(-(side or size) // pipe.step) * pipe.step for side in (height, width))
    b, c = pipe.stage_b, pipe.stage_c
    passes = {
        "stage C, one pass": _pass_flops(c, (rows // b.task.stride, columns // b.task.stride)),
        "stage B, one pass": _pass_flops(b, tuple(side // b.task.first_stage.stride for side in (rows, columns))),
    }
    latents = jax.ShapeDtypeStruct(
        (1, *(side // b.task.first_stage.stride for side in (rows, columns)), b.task.first_stage.channels), jnp.float32
    )
    # Scanned blocks would be counted once.
    first_stage = StageALatents(ConfigDict(b.config.vqgan.to_dict() | {"unroll": True}), b.config.latent_scale)
    decode = _flops(first_stage.decode, _abstract(b.groups), latents)
    times = {"stage C, one pass": _passes(c), "stage B, one pass": _passes(b)}
    total = sum(passes[name] * times[name] for name in passes) + decode
    return passes | {"stage A, decoding": decode, "sampling as the config says": total}


def _passes(stage) -> int:
    """As many as the config's sampling takes."""
    sampling = stage.config.sampling
    _, mixed = stage.task.denoiser.guidance(sampling.guidance)
    return sampling.steps * (1 if mixed is None else 2)


def _pass_flops(stage, latent_hw: tuple[int, int]) -> float:
    task, config = stage.task, stage.config
    channels = config.compressor.channels if config.task.startswith("stage_c") else task.first_stage.channels
    x, level = jnp.zeros((1, *latent_hw, channels)), jnp.zeros((1,))
    text = jnp.zeros((1, config.text.length, task.text.width)) if task.text.used else None
    if config.task.startswith("stage_c"):
        conditions = (text,)
    else:
        latents = jnp.zeros((1, 1, 1, config.compressor.channels)) if task.uses_latents else None
        conditions = (latents, text, latent_hw)
    params = _abstract(stage.groups[config.task])
    cond = jax.eval_shape(lambda p: task.denoiser.condition(p, *conditions), params)
    model = task.denoiser.model.clone(unroll=True)
    return _flops(lambda p, x, r, cond: model.apply({"params": p}, x, r, cond), params, x, level, cond)


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
