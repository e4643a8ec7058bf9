"""The PyTorch twins of `benchmarks/throughput.py` are twins: outputs, gradients, whole training steps."""

import json
import os

import jax
import numpy as np
import pytest

from fid_imagegen.diffusion.noise import example_keys, example_normal, lognormal_sigmas
from fid_imagegen.models import coordinate_mlp, dit, function_generator, uvit
from fid_imagegen.models.image_function import pixel_grid, variational_coordinates
from fid_imagegen.tasks.generator import generator_net

pytestmark = pytest.mark.parity
SIZE, BATCH = 8, 3
GENERATORS = ("dit", "uvit", "pixels", "function", "unet")
LEVELS = np.asarray(
    [-1.5, -0.0625, 0.9375], np.float32
)  # a thousand times as much is exact in float32, as diffusers needs


@pytest.fixture
def small(monkeypatch):
    """small(generator, **changes) -> our trainer at a size of seconds, all weights random."""
    pytest.importorskip("torch")
    from benchmarks import throughput

    trunk = {"width": 16, "heads": 2, "depth": 2}
    predictor = {"width": 16, "heads": 2, "extractor_depth": 2, "predictor_depth": 2, "function": "pixel32"}
    function = {"width": 8, "depth": 3, "bands": 2, "groups": 4}
    unet = {"widths": (8, 16), "blocks": 1, "attention_levels": (1,), "head_width": 4, "groups": 4}
    tables = (dit.DITS, trunk), (uvit.UVITS, trunk), (function_generator.PRESETS, predictor), (throughput.UNETS, unet)
    for table, sizes in tables:
        monkeypatch.setitem(table, "tiny", sizes)
    monkeypatch.setitem(coordinate_mlp.FUNCTION_PRESETS, "5x64", function)

    def make(generator, **changes):
        args = throughput.parse(["--preset=tiny", f"--image_size={SIZE}", f"--batch={BATCH}"])
        config = throughput.configure(generator, args).copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        draws = np.random.default_rng(0)
        trainer = throughput.Trainer(config, draws.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8))

        def draw(leaf):
            # Norms' scales are drawn too, so that neither ones nor a zero initialisation hides an error.
            fan_in = np.prod(leaf.shape[-min(leaf.ndim, 4) : -1]) if leaf.ndim > 1 else 4
            return (draws.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

        params = jax.tree.map(draw, trainer.state.params)
        copies = (jax.tree.map(jax.numpy.asarray, params) for _ in range(2))
        trainer.state = trainer.state.replace(params=next(copies), ema={"0.9999": next(copies)})
        return trainer, params["generator"]

    return make


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("generator", "changes"),
    [*((name, {}) for name in GENERATORS), ("function", {"model.weight_update": "scale"}), ("dit", {"model.patch": 4})],
)
def test_outputs_and_gradients_are_ours(small, generator, changes):
    import torch

    from benchmarks.torch_twins import make_twin, twin_state

    trainer, params = small(generator, **changes)
    model, draws = trainer.task.model, np.random.default_rng(1)
    image, seed = draws.standard_normal((2, BATCH, SIZE, SIZE, 3)).astype(np.float32)

    def ours(params):
        net = generator_net(model, params, training=False, variational=False, chunk=4096)
        return net(image, LEVELS[:, None], None)

    expected, pullback = jax.vjp(jax.jit(ours), params)
    twin = make_twin(model, params, SIZE)
    found = twin(*map(torch.from_numpy, (image, LEVELS, pixel_grid(SIZE, SIZE))))
    found.backward(torch.from_numpy(seed))
    error = relative(found.detach().numpy(), np.asarray(expected))
    gradients = twin_state(model, jax.tree.map(np.asarray, pullback(seed)[0]))
    assert gradients.keys() == {name for name, _ in twin.named_parameters()}
    # Some gradients are zero but for rounding: softmax sees no bias of the keys.
    largest = 1e-3 * max(gradient.abs().max() for gradient in gradients.values())
    errors = {
        name: float((x.grad - gradients[name]).abs().max() / (gradients[name].abs().max() + largest))
        for name, x in twin.named_parameters()
    }
    print(f"\n{generator}: outputs {error:.1e}, gradients {max(errors.values()):.1e}")
    assert error <= 1e-5 and max(errors.values()) <= 1e-4, max(errors, key=errors.get)


def our_draws(trainer, step):
    """What the step draws, from its key."""
    objective = trainer.task.objective
    noise_key, net_key = jax.random.split(jax.random.fold_in(trainer.key, step))
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(example_keys(noise_key, np.arange(BATCH)))
    t_B = lognormal_sigmas(keys[:, 0], objective.log_mean, objective.log_deviation, objective.noise)
    noise = example_normal(keys[:, 1], (SIZE, SIZE, 3))
    coords = variational_coordinates(pixel_grid(SIZE, SIZE), jax.random.fold_in(net_key, 1), size=SIZE)
    return t_B, objective.lower_level(t_B, objective.stage(step)), noise, coords


@pytest.mark.parametrize("generator", GENERATORS)
def test_steps_are_ours(small, generator):
    """Losses of three steps, of which each sees the updates before it, and the average after them."""
    import torch

    from benchmarks.torch_step import LEARNING_RATE, Draws, TorchTrainer
    from benchmarks.torch_twins import make_twin, twin_state

    trainer, params = small(generator)
    model = trainer.task.model
    twin = TorchTrainer(make_twin(model, params, SIZE), torch.from_numpy(np.array(trainer.batch["image"])))
    for step in range(3):
        draws = Draws(*(torch.from_numpy(np.array(x)) for x in our_draws(trainer, step)))
        np.testing.assert_allclose(twin.step(draws), trainer.step(), rtol=1e-4)
    averages = twin_state(model, jax.tree.map(np.asarray, trainer.state.ema["0.9999"]["generator"]))
    pairs = zip(twin.network.named_parameters(), twin.average, strict=True)
    off = torch.cat([(average - averages[name]).abs().flatten() for (name, _), average in pairs])
    # Adam's first updates are as large as the learning rate, also along gradients that are nothing but rounding.
    assert off.max() < 6 * LEARNING_RATE and off.mean() < 0.02 * LEARNING_RATE


@pytest.fixture
def same_cores():
    """The benchmark takes cores from the process; here it gives them back."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def test_the_benchmark_runs(small, same_cores, monkeypatch, capsys):
    from benchmarks import throughput

    command = (
        "throughput --generators dit,unet --preset tiny --image_size 8 --batch 2 --rounds 1 --turn 0.01 --threads 1"
    )
    monkeypatch.setattr("sys.argv", command.split())
    throughput.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in printed if line.startswith("{")]
    assert [row["generator"] for row in rows] == ["dit", "unet"]
    for row in rows:
        ours, theirs = row["images_per_s"]
        assert row["ratio"] == pytest.approx(ours / theirs) and row["peer"] == "torch eager"
        assert 0 < row["flops_per_image"] < 1e9 and row["matrix_flops_per_s"] > 1e8
    assert sum(line.startswith("| ") for line in printed) == 1 + len(rows)


def test_every_layer_is_counted(small):
    """FLOPs of a step grow with the depth."""
    one, two = (small("dit", **{"model.depth": depth})[0].flops() for depth in (2, 4))
    assert one * 1.3 < two < one * 2


def test_unknown_generators_are_refused(small, capsys):
    from benchmarks import throughput

    with pytest.raises(SystemExit):
        throughput.parse(["--generators=dit,gan"])
    assert (
        "found generators gan, expected of dit, uvit, pixels, function, unet; change --generators"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"found preset 'L' of unet, expected one of \['S', 'tiny'\]"):
        throughput.configure("unet", throughput.parse(["--preset=L"]))
