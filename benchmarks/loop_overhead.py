"""Steps/s of the whole training loop over steps/s of its bare compiled step on batches in memory; the goal is 0.95.

    python benchmarks/loop_overhead.py [--steps 1000]

The loop is `training.loop.train` with the digits config: data, key folding, finite check, JSONL and TensorBoard logs, previews
and checkpoints as often as the config has them. It takes turns with the bare step in one process, 50 steps each, so that whatever
else the machine does hits both. A turn of the loop ends when its last step is done and its checkpoints are on disk. A round is
the turns from one checkpoint to the next; the median ratio counts. The first turn, which compiles, is left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import digits_cm_func  # noqa: E402
from fid_imagegen.training import loop  # noqa: E402

BLOCK = 50


class Turns(loop.Run):
    """A run that stops every `BLOCK` steps, before the next batch, for as many bare steps on a state of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.compiled, self.step, self.turns, self.latest = self.step, self._noted_step, [], None
        with jax.set_mesh(self.mesh):
            self.bare, rows = self.initial(), super().batches(0)
            self.memory = [next(rows) for _ in range(BLOCK)]
            rows.close()

    def _noted_step(self, *args):
        self.latest = self.compiled(*args)
        return self.latest

    def batches(self, start: int):
        began = time.perf_counter()
        for number, batch in enumerate(super().batches(start), 1):
            yield batch
            if number % BLOCK == 0:
                # Here the loop asks for the next batch: what follows the step, checkpoints and previews too, is behind it.
                jax.block_until_ready(self.latest)
                Noted.latest.wait()
                whole = time.perf_counter() - began
                self.turns.append((whole, self._bare_steps()))
                began = time.perf_counter()

    def _bare_steps(self) -> float:
        began = time.perf_counter()
        for batch in self.memory:
            self.bare, _ = self.compiled(self.bare, self.frozen, batch, self.key)
        jax.block_until_ready(self.bare)
        return time.perf_counter() - began


class Noted(loop.Checkpoints):
    """Checkpoints that can be waited for from outside the loop."""

    latest: loop.Checkpoints

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Noted.latest = self


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    config = ConfigDict(digits_cm_func.get_config().to_dict())
    # Two turns more: the first is left out, and the end of the run is in none. The first preview compiles in a turn that counts.
    config.pretrain.num_steps, config.num_steps = 0, args.steps + 2 * BLOCK
    runs = []

    def make_run(*args):
        runs.append(Turns(*args))
        return runs[0]

    loop.Run, loop.Checkpoints = make_run, Noted
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(config.lock(), workdir)
    every = config.checkpoint.every // BLOCK
    turns = runs[0].turns[1:]
    rounds = [turns[i : i + every] for i in range(0, len(turns) - every + 1, every)]
    ratios = [sum(bare for _, bare in turns) / sum(whole for whole, _ in turns) for turns in rounds]
    wholes, bares = zip(*(turn for each in rounds for turn in each), strict=True)
    result = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loop_steps_per_s": BLOCK * len(wholes) / sum(wholes),
        "bare_steps_per_s": BLOCK * len(bares) / sum(bares),
    }
    print(json.dumps({"peer": "bare compiled step", "device": str(jax.devices()[0]), **result}))
    print(f"loop / bare compiled step: {result['ratio']:.3f} (median of {len(rounds)} rounds of {every * BLOCK} steps)")


if __name__ == "__main__":
    main()
