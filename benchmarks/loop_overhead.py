"""Steps/s of the whole training loop over steps/s of its bare compiled step on batches in memory; the goal is 0.95.

    python benchmarks/loop_overhead.py [--rounds 3] [--steps 300]

The loop is `training.loop.train` with the digits config: data pipeline, key folding, finite check, JSONL and TensorBoard logs, a
checkpoint every 100 steps. Rounds alternate loop and bare step in one process; the median ratio counts. The first log interval of
the loop (compilation) is left out, as are the bare step's first calls.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import digits_cm_func  # noqa: E402
from fid_imagegen.training.loop import Run, train  # noqa: E402
from fid_imagegen.training.writers import read_metrics  # noqa: E402


def loop_rate(config, workdir: str) -> float:
    """Steps/s of `train` between its first and its last log line."""
    train(config, workdir)
    lines = read_metrics(workdir)[1:]
    seconds = sum(config.log.every * config.batch_size / line["images_per_second"] for line in lines)
    return len(lines) * config.log.every / seconds


def bare_rate(config, workdir: str) -> float:
    """Steps/s of the compiled step alone, cycling through batches that are on the device already."""
    run = Run(config, workdir)
    with jax.set_mesh(run.mesh):
        state, rows = run.initial(), run.batches(0)
        batches = itertools.cycle([next(rows) for _ in range(8)])
        rows.close()
        for _ in range(5):
            state, metrics = run.step(state, run.frozen, next(batches), run.key)
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(config.num_steps):
            state, metrics = run.step(state, run.frozen, next(batches), run.key)
        jax.block_until_ready(metrics)
        return config.num_steps / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    config = ConfigDict(digits_cm_func.get_config().to_dict())
    config.pretrain.num_steps, config.num_steps = 0, args.steps
    config.checkpoint.every, config.log.sample_every = 100, args.steps
    loops, bares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            loops.append(loop_rate(config, f"{folder}/loop{number}"))
            bares.append(bare_rate(config, f"{folder}/bare{number}"))
    ratios = [loop / bare for loop, bare in zip(loops, bares, strict=True)]
    result = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loop_steps_per_s": loops,
        "bare_steps_per_s": bares,
    }
    print(json.dumps({"peer": "bare compiled step", "device": str(jax.devices()[0]), **result}))
    print(f"loop / bare compiled step: {result['ratio']:.3f} (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
