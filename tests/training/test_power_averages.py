"""Power averages of the parameters, and those of other widths made of their snapshots (EDM2, arXiv 2312.02696)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.interop.safetensors_io import load_tree
from fid_imagegen.parallel import mesh as meshes
from fid_imagegen.training import ema
from fid_imagegen.training.averaging import _gathered, average_of_width
from fid_imagegen.training.checkpoint import load_groups
from fid_imagegen.training.loop import train
from fid_imagegen.training.runs import read_params

STEPS = 400
# A parameter that wanders and settles.
PATH = np.cumsum(np.random.default_rng(0).standard_normal(STEPS)) / np.sqrt(1 + np.arange(STEPS))


def run(width, path=PATH):
    """The average of a width after every step."""
    value, found = jnp.zeros(()), []
    for step, parameter in enumerate(path):
        value = ema.update(value, parameter, ema.power_decay(ema.exponent(width), jnp.asarray(step)))
        found.append(float(value))
    return np.array(found)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.15, 3.56)])
def test_a_profile_has_its_width(width, gamma):
    """gamma as published; the deviation of tau / t under the profile tau^gamma is the width."""
    assert ema.exponent(width) == pytest.approx(gamma, abs=0.01)
    tau = (np.arange(100_000) + 0.5) / 100_000
    weight = tau ** ema.exponent(width)
    mean = np.average(tau, weights=weight)
    assert np.sqrt(np.average((tau - mean) ** 2, weights=weight)) == pytest.approx(width, rel=1e-3)


def test_the_running_average_is_the_weighted_sum():
    """Weights beta differences of t^(gamma + 1): the first parameter replaces what was before any."""
    gamma = ema.exponent(0.1)
    t = np.arange(1, STEPS + 1)
    weights = np.ones(STEPS)
    for n in range(1, STEPS):
        weights[n] = 1 - (1 - 1 / t[n]) ** (gamma + 1)
        weights[:n] *= (1 - 1 / t[n]) ** (gamma + 1)
    assert run(0.1)[-1] == pytest.approx(float(weights @ PATH), rel=1e-4)
    assert weights.sum() == pytest.approx(1) and run(0.1)[0] == pytest.approx(PATH[0], rel=1e-5)


def test_any_width_at_any_step_is_a_combination():
    steps = range(40, STEPS + 1, 40)
    snapshots = [(step, width) for step in steps for width in (0.05, 0.1)]
    values = {width: run(width) for width in (0.05, 0.1)}
    kept = np.array([values[width][step - 1] for step, width in snapshots])
    for step, width in ((STEPS, 0.08), (STEPS, 0.15), (STEPS, 0.2), (280, 0.1), (280, 0.07)):
        made = ema.combination(snapshots, (step, width)) @ kept
        assert made == pytest.approx(run(width)[step - 1], abs=0.01), (step, width)
        # What never moved is its own average.
        assert ema.combination(snapshots, (step, width)).sum() == pytest.approx(1, abs=1e-9)
    # One that was kept is itself.
    own = ema.combination(snapshots, (STEPS, 0.1))
    assert own[-1] == pytest.approx(1, abs=1e-6) and np.abs(own[:-1]).max() < 1e-6


def test_snapshots_of_a_run_make_a_folder_of_any_width(toy, tmp_path):
    config = toy(ema_widths=(0.05, 0.1), ema_snapshots=4, num_steps=24, ema_decays=(0.9,))
    assert train(config, tmp_path / "run")
    files = sorted(path.stem for path in (tmp_path / "run" / "snapshots").iterdir())
    assert files == [f"{step:09d}" for step in range(4, 25, 4)]
    average_of_width(tmp_path / "run", 0.1, tmp_path / "same")
    _, groups = load_groups(tmp_path / "run")
    made = read_params(tmp_path / "same")[1]
    np.testing.assert_allclose(
        made["generator"]["kernel"], groups["ema"]["width0.1"]["generator"]["kernel"], rtol=1e-4, atol=1e-6
    )
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    average_of_width(tmp_path / "run", 0.2, tmp_path / "wide")
    wide = read_params(tmp_path / "wide")[1]
    weights = iter(ema.combination([(int(stem), width) for stem in files for width in (0.05, 0.1)], (24, 0.2)))
    trees = [load_tree(tmp_path / "run" / "snapshots" / f"{stem}.safetensors")[0] for stem in files]
    expected = sum(
        next(weights) * tree[f"width{width}"]["generator"]["kernel"] for tree in trees for width in (0.05, 0.1)
    )
    np.testing.assert_allclose(wide["generator"]["kernel"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - made["generator"]["kernel"]).max() > 1e-4
    # Statistics are the last's, and what lies beside the weights comes along.
    assert wide["seen"] == groups["model_state"]["seen"] and (tmp_path / "wide" / "tokenizer.json").exists()


def test_widths_and_folders_that_cannot_be(toy, tmp_path):
    with pytest.raises(ValueError, match="found a relative width 0.5, expected one between 0 and 0.28"):
        ema.exponent(0.5)
    with pytest.raises(ValueError, match="found ema_snapshots without ema_widths"):
        train(toy(ema_snapshots=2), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="found no snapshots in .*ema_widths"):
        average_of_width(tmp_path, 0.1, tmp_path / "out")


def test_an_average_is_gathered_from_all_devices():
    mesh = meshes.make_mesh(1, 8, 1)
    cut = jax.device_put(jnp.arange(32.0), jax.NamedSharding(mesh, jax.P("fsdp")))
    assert not cut.is_fully_replicated
    whole = _gathered({"kernel": cut}, meshes.replicated(mesh))["kernel"]
    assert whole.is_fully_replicated
    np.testing.assert_array_equal(whole, np.arange(32.0))
