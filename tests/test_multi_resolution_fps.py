"""The paper's multi-resolution FPS: its formulas on given times, what is timed, and a real run of the tiny preset."""

import json

import jax
import numpy as np
import pytest

from benchmarks import multi_resolution_fps as benchmark
from benchmarks.multi_resolution_fps import FixedSizes, Turn, configured, measure, report
from fid_imagegen import tasks

# Two rounds of 10 images of the small sizes and 1 of the large.
FIXED = [
    (Turn(10, 0.0, {32: 1.0, 64: 2.0, 128: 3.0}), Turn(1, 0.0, {256: 0.5, 512: 2.0})),
    (Turn(10, 0.0, {32: 1.0, 64: 1.0, 128: 1.0}), Turn(1, 0.0, {256: 0.5, 512: 1.0})),
]
FUNCTIONS = [(Turn(10, 2.0, {32: 0.25, 64: 0.25, 128: 0.5}), Turn(1, 0.8, {256: 0.2, 512: 0.55}))] * 2


def test_the_formulas_are_the_papers():
    """3 n / sum(T32 + T64 + T128) = 5 and 10; 3 n / sum(T + TR32 + TR64 + TR128) = 10; FPS at 256 over 512 = 1.35 / 1."""
    fixed, functions = report(FIXED, FUNCTIONS), report(FUNCTIONS, FUNCTIONS)
    assert fixed["fps"] == {"median": 7.5, "lowest": 5.0, "highest": 10.0}
    assert functions["fps"] == {"median": 10.0, "lowest": 10.0, "highest": 10.0}
    assert fixed["over_peer"] == {"median": 0.75, "lowest": 0.5, "highest": 1.0}
    assert functions["slow_down"]["median"] == pytest.approx(1.35) and functions["fps_at"][256]["median"] == 1
    assert fixed["slow_down"] == {"median": 3.0, "lowest": 2.0, "highest": 4.0}
    assert functions["fps_at"][128]["median"] == 4 and fixed["fps_at"][64] == {
        "median": 7.5,
        "lowest": 5.0,
        "highest": 10.0,
    }
    small = report([(small, Turn(1, 0.0, {256: 0.5})) for small, _ in FIXED], FIXED)
    assert small["slow_down"] is None and 512 not in small["fps_at"]


def test_all_take_turns_and_the_first_is_left_out():
    asked = []

    class Recorder:
        sizes = (32, 64, 128, 256)

        def __init__(self, name):
            self.name = name

        def start(self, num):
            asked.append((self.name, num))
            return num

        def images(self, num, size):
            asked.append((self.name, num, size))

    turns = measure({name: Recorder(name) for name in "ab"}, 3, 2, 4)
    once = lambda name: [(name, 3), *((name, 3, size) for size in (32, 64, 128)), (name, 2), (name, 2, 256)]  # noqa: E731
    assert asked == 5 * (once("a") + once("b"))
    assert [len(found) for found in turns.values()] == [4, 4]
    small, large = turns["a"][0]
    assert (small.num, set(small.by_size), large.num, set(large.by_size)) == (3, {32, 64, 128}, 2, {256})


@pytest.mark.parametrize("generator", benchmark.GENERATORS)
def test_networks_are_the_presets_at_every_size(generator):
    """The U-Net has EDM's parameters at the two sizes that EDM has, and its attention at 16 px; the others see 256 tokens."""
    for size in (32, 64, 128, 256, 512):
        config = configured(generator, "S", size)
        model, task = config.model, tasks.build(config)
        assert (config.data.image_size, model.dtype) == (size, "float32")
        if generator == "unet":
            assert [size >> level for level in model.unet.attention_levels] == [16]
            shapes = jax.eval_shape(lambda: task.init(jax.random.key(0))[0]) if size < 128 else {}  # noqa: B023
            count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
            assert count == {32: 55_732_739, 64: 61_804_419}.get(size, 0)
        else:
            assert (model.preset, size // model.patch) == ("S", 16)
        if generator == "function_pixel128":
            assert (task.model.kind.values, task.model.kind.width) == (32, 128)
        elif generator.startswith("function"):
            assert f"function_{task.model.kind.depth}x{task.model.kind.width}" == generator


def test_a_real_run_makes_the_pipelines_images(monkeypatch, capsys):
    """Of 16 px tokens of one pixel, so that the real tiny networks compile in seconds."""
    for name, value in {"SIZES": (16,), "LARGE": (32, 48), "GRID": 16}.items():
        monkeypatch.setattr(benchmark, name, value)
    made, images = [], FixedSizes.images
    monkeypatch.setattr(FixedSizes, "images", lambda self, *asked: made.append((self, asked, images(self, *asked))))
    asked = ["--preset=tiny", "--num=2", "--rounds=1", "--generators", "function_5x64", "dit"]
    monkeypatch.setattr("sys.argv", ["multi_resolution_fps", *asked])
    benchmark.main()
    hardware, *rows, heading, _, first, second = capsys.readouterr().out.splitlines()
    assert hardware.startswith("hardware: ") and "slow-down" in heading
    rows = [json.loads(row) for row in rows]
    assert [row["generator"] for row in rows] == ["function_5x64", "dit"]
    assert all(row["fps"]["median"] > 0 and set(row["fps_at"]) == {"16", "32", "48"} for row in rows)
    assert rows[0]["over_peer"]["median"] == 1 and {row["peer"] for row in rows} == {"function_5x64"}
    assert first.startswith("| function_5x64 | ") and second.startswith("| dit | ")
    # What a fixed size is timed at are its own pixels: those that a render of that size interpolates in their places.
    for fixed, (num, size), found in made[-3:]:
        rendered = fixed.pipes[size].generate(num).render(size, size)
        assert found.shape == rendered.shape == (num, size, size, 3) and found.dtype == np.uint8
        assert np.abs(found - rendered.astype(int)).max() <= 1 < np.ptp(found)
