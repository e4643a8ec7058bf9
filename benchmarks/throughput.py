"""Images/s of training: ours against plain PyTorch twins of the same shapes, in turns in one process; the goal is a ratio of 1.

    python -m benchmarks.throughput [--generators dit,uvit,pixels,function,unet] [--preset S] [--rounds 3] [--compile]

A step is whole: easy consistency tuning's loss, gradient, Adam, one average of the parameters. Ours is the loop's, made by
`state.compile_step` with `config.model.unroll`; the twin's is `torch_step`'s. A turn is as many steps as fill `--turn` seconds,
the same number on both sides; medians of the rounds count. With --compile the peer is whichever of eager PyTorch and
torch.compile was quicker in two steps each. Both frameworks get the same cores and run one after the other.
FLOPs are XLA's count of our step before optimisation, with no scan left in it. The matrix rate is that of whichever framework
multiplies two square matrices quicker here; float32 on a GPU means TF32 on both sides.
The convolutions of `unet` are reported, on a CPU without a goal. Its sizes are below; the others' are the networks' presets.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.torch_step import LEARNING_RATE, TorchTrainer  # noqa: E402
from benchmarks.torch_twins import make_twin  # noqa: E402
from configs import common  # noqa: E402
from fid_imagegen import tasks  # noqa: E402
from fid_imagegen.parallel import mesh as meshes  # noqa: E402
from fid_imagegen.parallel import sharding  # noqa: E402
from fid_imagegen.training import ema, optimizer, state  # noqa: E402

GOAL = 1.0
GENERATORS = ("dit", "uvit", "pixels", "function", "unet")
UNETS = {
    "tiny": {"widths": (32, 64), "blocks": 1, "attention_levels": (1,), "head_width": 32, "groups": 8},
    "S": {"widths": (64, 128, 128), "blocks": 2, "attention_levels": (1,), "head_width": 64, "groups": 32},
}


def configure(generator: str, args: argparse.Namespace):
    """The config of a generator in training. ValueError for a U-Net of no such preset, and from `tasks` for the others'."""
    config = common.base()
    network = "function" if generator == "pixels" else generator  # the presets' functions are those of pixels
    config.model.update({"network": network, "preset": args.preset, "patch": args.patch, "dtype": args.dtype})
    config.model.unroll = True
    if generator == "function":  # the paper's
        config.model.function, config.variational = "5x64" if args.preset == "tiny" else "5x256", True
    if generator == "unet":
        if args.preset not in UNETS:
            raise ValueError(f"found preset {args.preset!r} of unet, expected one of {sorted(UNETS)}; change --preset")
        config.model.preset, config.sharding.rules = "adm_64", common.UNET_RULES
        config.model.unet.update(UNETS[args.preset])
    config.data.image_size, config.batch_size = args.image_size, args.batch
    config.optimizers.generator = common.optimizer("adam", LEARNING_RATE)
    return config.lock()


class Trainer:
    """Our network in training, as the loop lays it out, on one device and a batch in its memory."""

    def __init__(self, config, images: np.ndarray):
        self.task, self.mesh = tasks.build(config), meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.optimizers, averages = optimizer.build_all(config, self.task.trained), ema.averages(config)
        self.key, rows = jax.random.key(config.seed), meshes.batch_sharding(self.mesh)
        create = lambda key: state.create(self.task, self.optimizers, averages, key)  # noqa: E731
        rules = config.sharding
        with jax.set_mesh(self.mesh):
            shardings = sharding.resolve(
                rules.rules, jax.eval_shape(create, self.key), self.mesh, min_size=rules.min_size
            )
            self.state = jax.jit(create, out_shardings=shardings)(self.key)
            labels = np.zeros(len(images), np.int32)
            self.batch = jax.device_put({"image": images, "label": labels}, rows)
            self.compiled = state.compile_step(self.task, self.optimizers, config, self.mesh, shardings, rows)

    def step(self):
        """The new state, and the loss."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, {}, self.batch, self.key)
        return metrics["loss"]

    def flops(self) -> float:
        """Of one step, 2 a multiply-add."""
        with jax.set_mesh(self.mesh):
            return self.compiled.lower(self.state, {}, self.batch, self.key).cost_analysis()["flops"]


def seconds(step: Callable, steps: int) -> float:
    """Of one of so many steps, until the last is done on the device."""
    began = time.perf_counter()
    for _ in range(steps):
        done = step()
    done.block_until_ready() if isinstance(done, jax.Array) else done.item()
    return (time.perf_counter() - began) / steps


def matrix_rate(device: torch.device, dtype: str, side: int) -> float:
    """FLOPs a second of square matrices, in the better of both frameworks."""
    ours = jnp.ones((side, side), dtype)
    theirs = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
    multiply = jax.jit(lambda a: (a @ a)[0, 0])
    best = math.inf
    for work in (lambda: multiply(ours), lambda: (theirs @ theirs)[0, 0]):
        best = min(best, *(seconds(work, 1) for _ in range(4)))
    return 2 * side**3 / best


def peers(network: torch.nn.Module, images: torch.Tensor, args: argparse.Namespace) -> dict[str, TorchTrainer]:
    """Eager PyTorch, and torch.compile where it is asked for and works: on parameters that are one network's."""
    bfloat16 = args.dtype == "bfloat16"
    found = {"eager": TorchTrainer(network, images, bfloat16=bfloat16)}
    if args.compile:
        compiled = TorchTrainer(network, images, compiled=True, bfloat16=bfloat16)
        try:
            compiled.step()
            found["compiled"] = compiled
        except Exception as error:  # whatever a backend raises
            print(f"torch.compile does not work here: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return found


def compare(generator: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Rates of both, FLOPs of ours."""
    size = args.image_size
    images = np.random.default_rng(0).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    ours = Trainer(configure(generator, args), images)
    params = jax.tree.map(np.asarray, ours.state.params["generator"])
    network = make_twin(ours.task.model, params, size).to(device)
    theirs = peers(network, torch.from_numpy(images).to(device), args)
    flops = ours.flops() / args.batch
    began = time.perf_counter()
    seconds(ours.step, 1)
    compiling = time.perf_counter() - began
    trial = {name: min(seconds(peer.step, 1) for _ in range(2)) for name, peer in theirs.items()}
    chosen = min(trial, key=trial.get)
    steps = max(1, round(args.turn / trial[chosen]))
    turns = [(seconds(ours.step, steps), seconds(theirs[chosen].step, steps)) for _ in range(args.rounds)]
    rates = [args.batch / statistics.median(column) for column in zip(*turns, strict=True)]
    ratios = sorted(torch_s / ours_s for ours_s, torch_s in turns)
    return {
        "peer": f"torch {chosen}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "flops_per_image": flops,
        "images_per_s": rates,
        "flops_per_s": [flops * rate for rate in rates],
        "goal": GOAL,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "trial_s": trial,
        "steps_a_turn": steps,
        "compile_s": compiling,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", default=",".join(GENERATORS))
    parser.add_argument("--preset", default="S")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of a turn, at least one step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="try torch.compile too")
    args = parser.parse_args(argv)
    args.generators = args.generators.split(",")
    if unknown := sorted(set(args.generators) - set(GENERATORS)):
        parser.error(f"found generators {', '.join(unknown)}, expected of {', '.join(GENERATORS)}; change --generators")
    return args


def main():
    args = parse()
    # XLA counts the cores it may run on when its client is made; PyTorch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    gpu = jax.default_backend() == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        torch.set_float32_matmul_precision("high")
    rate = matrix_rate(device, args.dtype, 8192 if gpu else 2048)
    place = {"device": str(jax.devices()[0]), "threads": args.threads, "matrix_flops_per_s": rate, **vars(args)}
    found = {}
    for name in args.generators:
        found[name] = compare(name, args, device)
        print(json.dumps({"generator": name} | place | found[name]), flush=True)
    print(f"{place['device']}, {args.threads} threads, {args.dtype}: {rate / 1e9:.0f} GFLOP/s of matrices")
    print(
        "| generator | parameters, M | GFLOP an image | images/s | torch's | ratio (range) | share of matrices' rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        ours, theirs = row["images_per_s"]
        cells = [
            name,
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['flops_per_image'] / 1e9:.2f}",
            f"{ours:.3g}",
            f"{theirs:.3g} ({row['peer'].removeprefix('torch ')})",
            f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
            ", ".join(f"{each / rate:.0%}" for each in row["flops_per_s"]),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
