"""Stage C at 1024 px against two rivals on f8 latents: FLOPs of a forward pass, and images/s of training.

    python -m benchmarks.stage_c_flops [--rounds 7]

Rivals: the U-Net of Würstchen's App. E.4, and a Transformer as wide as Stage C and of as many parameters, one token a position.
Both see 128x128 positions where Stage C sees 24x24: 28 times more. FLOPs are XLA's count on abstract shapes before optimisation,
the text's keys and values included, as training needs them. Rates are of whole training steps (loss, gradient, Adam's update)
at reduced width: each rival takes turns with a Stage C that is reduced as it is, in one process; medians count. The goal is a
ratio of rates of at least 0.8 of the ratio of FLOPs of the same reduced networks.
"""

import argparse
import json
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.wuerstchen.ldm import PAPER_BASELINE, LatentUNet
from fid_imagegen.models.wuerstchen.stage_c import PUBLIC_STAGE_C, StageC
from fid_imagegen.models.wuerstchen.stage_c_dit import EQUAL_TO_STAGE_C, StageCTransformer
from fid_imagegen.tasks.latent import LatentDenoiser

GOAL = 0.8
TOKENS = 77
SEMANTIC, F8 = (24, 24, 16), (128, 128, 4)  # latents at 1024 px


class Network(NamedTuple):
    """A network and what it sees: the shape of its latents, the width of its text."""

    model: Any
    latents: tuple[int, int, int]
    text_width: int

    def inputs(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Latents, noise levels and text, abstract."""
        shapes = (batch, *self.latents), (batch,), (batch, TOKENS, self.text_width)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def init(self, key, *inputs):
        """Parameters."""
        return self.model.init(key, *inputs, method=self.model.end_to_end)["params"]


def stage_c(**reduced) -> Network:
    """The public Stage C, or one reduced."""
    fields = PUBLIC_STAGE_C | reduced
    return Network(StageC(**fields, unroll=True), SEMANTIC, fields["c_cond"])


def unet(**reduced) -> Network:
    """The U-Net of App. E.4, or one reduced."""
    fields = PAPER_BASELINE | reduced
    return Network(LatentUNet(**fields, unroll=True), F8, fields["text_width"])


def transformer(**reduced) -> Network:
    """The Transformer of Stage C's parameters on f8 latents, or one reduced."""
    fields = EQUAL_TO_STAGE_C | {"channels": F8[-1]} | reduced
    return Network(StageCTransformer(**fields, unroll=True), F8, fields["text_width"])


class Pair(NamedTuple):
    """A rival, and Stage C and the rival reduced alike, each with its images a step."""

    rival: Network
    stage_c_reduced: tuple[Network, int]
    rival_reduced: tuple[Network, int]


# A quarter of the width and of the depth. At 16,384 tokens a head's attention weights alone are 1 GiB: a twelfth there.
PAIRS = {
    "U-Net": Pair(
        unet(),
        (stage_c(c=384, c_cond=320, depth=8, nhead=6, dropout=0.0), 4),
        (unet(widths=(80, 160, 320, 320), heads=(1, 2, 5, 5), blocks=(1, 1, 3, 1), text_width=192, dropout=0.0), 1),
    ),
    "Transformer": Pair(
        transformer(),
        (stage_c(c=128, c_cond=96, depth=2, nhead=2, dropout=0.0), 28),
        (transformer(width=128, text_width=96, depth=1, heads=2, dropout=0.0), 1),
    ),
}


def forward_flops(network: Network) -> float:
    """Of one image, 2 a multiply-add."""
    inputs = network.inputs(1)
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    forward = lambda params, *inputs: network.model.apply({"params": params}, *inputs, method=network.model.end_to_end)  # noqa: E731
    return jax.jit(forward).lower(params, *inputs).cost_analysis()["flops"]


class Trainer:
    """A network in training on a batch of noise."""

    def __init__(self, network: Network, batch: int):
        self.batch, self.optimizer = batch, optax.adam(1e-4)
        denoiser, key = LatentDenoiser(network.model, "v"), jax.random.key(0)
        latents, level, text = (jax.random.normal(key, x.shape, x.dtype) for x in network.inputs(batch))
        params = jax.jit(network.init)(key, latents, level, text)
        self.state = params, self.optimizer.init(params)

        def step(state):
            params, opt_state = state
            keys_B = example_keys(key, jnp.arange(batch))
            loss = lambda params: jnp.mean(denoiser.loss(params, latents, (text,), keys_B=keys_B, key=key))  # noqa: E731
            updates, opt_state = self.optimizer.update(jax.grad(loss)(params), opt_state)
            return optax.apply_updates(params, updates), opt_state

        self._step = jax.jit(step, donate_argnums=0)

    def images_per_second(self) -> float:
        """Over one step."""
        began = time.perf_counter()
        self.state = jax.block_until_ready(self._step(self.state))
        return self.batch / (time.perf_counter() - began)


def measure(ours: tuple[Network, int], rival: tuple[Network, int], rounds: int) -> list[tuple[float, float]]:
    """Images/s of both in turn, one pair a round; the steps that compile are left out."""
    trainers = [Trainer(*ours), Trainer(*rival)]
    for trainer in trainers:
        trainer.images_per_second()
    return [tuple(trainer.images_per_second() for trainer in trainers) for _ in range(rounds)]


def compare(pair: Pair, rounds: int) -> dict[str, Any]:
    """FLOPs and rates of Stage C and a rival; ratios say how many times cheaper, and quicker, Stage C is."""
    full = [forward_flops(network) for network in (stage_c(), pair.rival)]
    reduced = [forward_flops(network) for network, _ in (pair.stage_c_reduced, pair.rival_reduced)]
    rates = measure(pair.stage_c_reduced, pair.rival_reduced, rounds)
    ratios = sorted(ours / theirs for ours, theirs in rates)
    measured, counted = statistics.median(ratios), reduced[1] / reduced[0]
    return {
        "flops": full,
        "flop_ratio": full[1] / full[0],
        "reduced_flops": reduced,
        "reduced_flop_ratio": counted,
        "images_per_s": [statistics.median(column) for column in zip(*rates, strict=True)],
        "measured_ratio": measured,
        "measured_ratios": ratios,
        "measured_over_flops": measured / counted,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    found = {}
    for name, pair in PAIRS.items():
        found[name] = compare(pair, args.rounds)
        print(json.dumps({"peer": name, "device": str(jax.devices()[0]), **found[name]}), flush=True)
    print(
        "| Stage C against | TFLOPs a pass | ratio | reduced: GFLOPs | ratio | images/s | ratio (range) | over FLOPs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = [
            name,
            "{:.2f}, {:.2f}".format(*(flops / 1e12 for flops in row["flops"])),
            f"{row['flop_ratio']:.2f}",
            "{:.2f}, {:.2f}".format(*(flops / 1e9 for flops in row["reduced_flops"])),
            f"{row['reduced_flop_ratio']:.2f}",
            "{:.3g}, {:.3g}".format(*row["images_per_s"]),
            f"{row['measured_ratio']:.2f} ({row['measured_ratios'][0]:.2f} to {row['measured_ratios'][-1]:.2f})",
            f"{row['measured_over_flops']:.2f} (goal {GOAL})",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
