"""Images/s where every image is wanted at 32, 64 and 128 px, and what 512 px costs beside 256: functions against fixed sizes.

    python -m benchmarks.multi_resolution_fps [--preset S] [--num 2] [--rounds 3] [--generators function_5x256 dit]

The paper's multi-resolution FPS. Fixed sizes need a network each; a generator of functions generates once and renders thrice:

    3 num / sum_i (T32_i + T64_i + T128_i)        3 num / sum_i (T_i + TR32 + TR64 + TR128)

The slow-down is the FPS at 256 px over that at 512 px, of `num_large` images; the paper has 1.35, and 4 for anyres-GAN. Weights
are random: time does not depend on them. All is float32 and goes through the pipeline, from noise to bytes. Generators take turns
in one process; their first turns, which compile, are left out; medians of rounds count, ratios are taken within a round.

Functions are those of CelebA-64; renders below 64 px average 64, as everywhere. Patches of the Transformers grow with the size:
tokens stay 256, as in the presets. The U-Net is EDM's DDPM++ of 32 px with one more level, of half the width, for every doubling
and its attention still at 16 px; at 64 px that is EDM's own. Its 512 px (S: 2.8 TFLOPs a pass) need `--unet_at_most 512`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import celeba64_cm_func
from fid_imagegen.models.rendering import quantise
from fid_imagegen.pipelines import ImageFunctionPipeline, RenderableFunctions
from fid_imagegen.tasks.generator import render_native

SIZES, LARGE, GRID = (32, 64, 128), (256, 512), 64
GENERATORS = ("function_5x256", "function_5x64", "function_pixel128", "dit", "uvit", "unet")
STEMS = {"tiny": 32, "S": 128}  # of the U-Net: tiny is a quarter as wide


class Turn(NamedTuple):
    """Seconds of `num` images: what all sizes share, and those of every size."""

    num: int
    shared: float
    by_size: dict[int, float]

    def fps(self, *sizes: int) -> float:
        """Images/s where every image is wanted at these sizes."""
        return len(sizes) * self.num / (self.shared + sum(self.by_size[size] for size in sizes))


def configured(generator: str, preset: str, size: int) -> ConfigDict:
    """The config of a generator of images of `size`."""
    config, (network, _, function) = celeba64_cm_func.build(size, "").unlock(), generator.partition("_")
    config.model.update({"network": network, "preset": preset, "function": function or None, "dtype": "float32"})
    if network == "unet":
        stem, doublings = STEMS[preset], (size // 32).bit_length() - 1
        widths = (stem,) * doublings + (2 * stem,) * 3
        config.model.preset = "ddpmpp_32"
        config.model.unet.update({"stem": stem, "widths": widths, "attention_levels": (doublings + 1,)})
    return config.lock()


def pipeline(config: ConfigDict) -> ImageFunctionPipeline:
    """Its weights random."""
    pipe, draw = ImageFunctionPipeline(config, {}), np.random.default_rng(0)  # jax would compile how to draw
    shapes = jax.eval_shape(lambda: pipe.task.init(jax.random.key(0))[0])
    pipe.params = jax.tree.map(lambda x: jnp.asarray(0.02 * draw.standard_normal(x.shape, np.float32)), shapes)
    return pipe


class Functions:
    """A generator of functions: one network for all sizes."""

    def __init__(self, generator: str, preset: str, sizes: tuple[int, ...]):
        self.sizes, self.pipe = sizes, pipeline(configured(generator, preset, GRID))
        self.parameters = count(self.pipe)

    def start(self, num: int) -> RenderableFunctions:
        """The functions."""
        functions = self.pipe.generate(num)
        jax.block_until_ready(functions.functions)
        return functions

    def images(self, functions: RenderableFunctions, size: int) -> np.ndarray:
        """Renders, uint8 [num, size, size, channels]."""
        return functions.render(size, size)


class FixedSizes:
    """A network for every size."""

    def __init__(self, generator: str, preset: str, sizes: tuple[int, ...]):
        self.sizes = sizes
        self.pipes = {size: pipeline(configured(generator, preset, size)) for size in sizes}
        self.parameters = count(self.pipes[GRID])

    def start(self, num: int) -> int:
        """Nothing."""
        return num

    def images(self, num: int, size: int) -> np.ndarray:
        """Pixels, uint8 [num, size, size, channels]; not by `render`, which would interpolate them at a cost not theirs."""
        functions = self.pipes[size].generate(num).functions
        return np.asarray(quantise(render_native(functions, key=None, chunk=size**2)))


def count(pipe: ImageFunctionPipeline) -> int:
    """Parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(pipe.params))


def seconds(work) -> tuple[float, Any]:
    """(time, result)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def take_turn(generator: Functions | FixedSizes, num: int, sizes: tuple[int, ...]) -> Turn:
    """Makes `num` images at every size that the generator has."""
    shared, state = seconds(lambda: generator.start(num))
    by_size = {size: seconds(lambda: generator.images(state, size))[0] for size in sizes if size in generator.sizes}  # noqa: B023
    return Turn(num, shared, by_size)


def measure(generators: dict, num: int, num_large: int, rounds: int) -> dict[str, list[tuple[Turn, Turn]]]:
    """A (turn of SIZES, turn of LARGE) a round for every generator, all in turn; those that compile are left out."""
    turns = {name: [] for name in generators}
    for _ in range(rounds + 1):
        for name, generator in generators.items():
            turns[name].append((take_turn(generator, num, SIZES), take_turn(generator, num_large, LARGE)))
    return {name: found[1:] for name, found in turns.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def report(turns: list[tuple[Turn, Turn]], peers: list[tuple[Turn, Turn]]) -> dict[str, Any]:
    """What one generator has done, and its multi-resolution FPS over its peer's of the same round."""
    fps, theirs = ([small.fps(*SIZES) for small, _ in each] for each in (turns, peers))
    singles = [{size: turn.fps(size) for turn in both for size in turn.by_size} for both in turns]
    large, larger = LARGE
    return {
        "fps": summary(fps),
        "over_peer": summary([own / other for own, other in zip(fps, theirs, strict=True)]),
        "fps_at": {size: summary([single[size] for single in singles]) for size in singles[0]},
        "slow_down": summary([single[large] / single[larger] for single in singles]) if larger in singles[0] else None,
        "shared_s": summary([small.shared for small, _ in turns]),
    }


def hardware() -> str:
    """What this runs on."""
    cores = len(os.sched_getaffinity(0))
    return f"{jax.devices()[0].device_kind}; {cores} cores of {platform.machine()}; jax {jax.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=STEMS, default="S")
    parser.add_argument("--num", type=int, default=2, help="images at 32, 64 and 128 px")
    parser.add_argument("--num_large", type=int, default=1, help="images at 256 and 512 px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=GENERATORS, help="the first is the peer")
    parser.add_argument("--unet_at_most", type=int, default=256, help="px of the largest U-Net")
    args = parser.parse_args()
    print(f"hardware: {hardware()}", flush=True)
    generators = {}
    for name in args.generators:
        kind = Functions if name.startswith("function") else FixedSizes
        largest = args.unet_at_most if name == "unet" else max(LARGE)
        generators[name] = kind(name, args.preset, tuple(size for size in SIZES + LARGE if size <= largest))
    turns = measure(generators, args.num, args.num_large, args.rounds)
    peer = args.generators[0]
    found = {name: report(own, turns[peer]) for name, own in turns.items()}
    for name, row in found.items():
        setting = {"generator": name, "preset": args.preset, "parameters": generators[name].parameters, "peer": peer}
        setting |= {"num": args.num, "num_large": args.num_large, "device": str(jax.devices()[0])}
        print(json.dumps(setting | row), flush=True)
    large = " | ".join(f"FPS at {size}" for size in LARGE)
    print(f"| {args.preset} | parameters | multi-resolution FPS (range) | over {peer} | {large} | slow-down |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = [
            name,
            f"{generators[name].parameters / 1e6:.1f} M",
            "{median:.3g} ({lowest:.3g} to {highest:.3g})".format(**row["fps"]),
            f"{row['over_peer']['median']:.3g}",
            *(f"{row['fps_at'][size]['median']:.3g}" if size in row["fps_at"] else "left out" for size in LARGE),
            "{median:.3g} ({lowest:.3g} to {highest:.3g})".format(**row["slow_down"]) if row["slow_down"] else "",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
