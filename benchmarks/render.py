"""Time of 32 + 64 + 128 px renders over the time of generating the functions, and the memory of a 4096 px render.

    python benchmarks/render.py [--config digits_cm_func] [--num 16] [--rounds 5]

The paper calls rendering "nearly negligible" beside generation. Weights are random: time does not depend on them. Generation
and renders alternate in one process; medians count. The 4096 px render of one function runs in a process of its own: its peak
resident memory, less what was resident before the render, is an upper bound of what the render added.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from fid_imagegen.pipelines import ImageFunctionPipeline  # noqa: E402

SIZES = (32, 64, 128)


def load(name: str) -> ImageFunctionPipeline:
    """A pipeline of the named config[:argument] with random weights."""
    name, _, arg = name.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    pipe = ImageFunctionPipeline(config, {})
    pipe.params = jax.jit(pipe.task.init)(jax.random.key(0))[0]
    return pipe


def seconds(work) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def memory_of_4096(name: str) -> None:
    """Prints the MiB that one 4096 px render adds, at most, to a process that has rendered 64 px."""
    functions = load(name).generate(1)
    functions.render(64, 64)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    functions.render(4096, 4096)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resident / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="digits_cm_func")
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_only:
        memory_of_4096(args.config)
        return
    pipe = load(args.config)
    functions = pipe.generate(args.num)
    for size in SIZES:
        functions.render(size, size)
    generate, render = [], []
    for _ in range(args.rounds):
        generate.append(seconds(lambda: pipe.generate(args.num).functions.per_image))
        render.append(seconds(lambda: [functions.render(size, size) for size in SIZES]))
    child = [sys.executable, __file__, "--config", args.config, "--memory_only"]
    added = float(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])
    result = {
        "ratio": statistics.median(render) / statistics.median(generate),
        "generate_s": statistics.median(generate),
        "render_s": statistics.median(render),
        "num": args.num,
        "mib_added_by_4096px": added,
    }
    print(
        json.dumps(
            {"peer": "generating the functions", "config": args.config, "device": str(jax.devices()[0]), **result}
        )
    )
    print(f"32 + 64 + 128 px over generation: {result['ratio']:.2f}; 4096 px adds {added:.0f} MiB")


if __name__ == "__main__":
    main()
