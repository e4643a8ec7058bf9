"""How a study's work units become arms, and when two arms differ."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import study
from benchmarks.study import arms, decided, plot, summary


def unit(seed, value, **overrides):
    return {"overrides": overrides | {"seed": seed}, "frechet": value}


def write_unit(folder, overrides, steps=(5,)):
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"num_steps": 5}')
    (folder / "manifest.json").write_text(json.dumps({"overrides": overrides}))


UNITS = [unit(seed, value, variant="dit") for seed, value in enumerate((1.0, 1.2, 1.4))]
UNITS += [unit(seed, value, variant="uvit") for seed, value in enumerate((1.5, 1.6, 1.7))]


def test_units_that_differ_in_the_seed_alone_are_an_arm():
    grouped = arms(UNITS)
    assert [len(group) for group in grouped.values()] == [3, 3]
    assert [json.loads(name) for name in grouped] == [{"variant": "dit"}, {"variant": "uvit"}]
    assert summary(grouped['{"variant": "dit"}'], "frechet") == {"mean": 1.2, "spread": 0.3999999999999999, "seeds": 3}


def test_a_gap_below_the_seeds_spread_is_undecided(tmp_path):
    found = {name: {"frechet": summary(group, "frechet")} for name, group in arms(UNITS).items()}
    one, other = (arm["frechet"] for arm in found.values())
    assert not decided(one, other) and decided(one, other | {"mean": 1.65}) and decided(other | {"mean": 1.65}, one)
    alone = {"mean": 0.0, "spread": 0.0, "seeds": 1}  # one seed has no spread to go by
    assert not decided(alone, one) and not decided(one, alone)
    plot(arms(UNITS), "frechet", tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_a_unit_is_scored_against_what_was_held_out(monkeypatch):
    data, asked = SimpleNamespace(source="digits", image_size=4), []
    pipe = SimpleNamespace(config=SimpleNamespace(data=data), generate=lambda num, *, steps: (num, steps))

    def report(pipe, extract, **settings):
        asked.append(settings)
        return {"samples": 0.5, "training": 0.1}

    monkeypatch.setattr(study, "ImageFunctionPipeline", SimpleNamespace(from_pretrained=lambda folder: pipe))
    monkeypatch.setattr(study.sources, "make_source", lambda data, held_out=False: range(7 if held_out else 20))
    monkeypatch.setattr(study, "frechet_report", report)
    monkeypatch.setattr(study, "native_samples", lambda pipe, num, *, steps: (num, steps))
    monkeypatch.setattr(study, "DigitJudge", lambda data: SimpleNamespace(judge=lambda images: {"confident": images}))
    monkeypatch.setattr(study, "agreement", lambda functions, size, factor: (*functions, size, factor))
    sizes = {"psnr_2x": (64, 2, 4, 2), "psnr_4x": (64, 2, 4, 4)}
    assert study.score("folder", None, steps=2) == {"frechet": 0.5, "judged": (1000, 2)} | sizes
    assert asked == [{"num": 7, "steps": 2}]


def test_large_renders_are_averaged_back_to_the_small():
    """One function is brighter where it is rendered larger, the other has stripes there that average out."""

    def render(height, width):
        images, large = np.full((2, height, width, 1), 100, np.uint8), height > 4
        images[0] += 10 * large
        images[1, ::2] += 20 if large else 10
        images[1, 1::2] += 0 if large else 10
        return images

    found = study.agreement(SimpleNamespace(render=render), 4, 2)
    assert found == pytest.approx(10 * np.log10(255**2 / (10**2 / 2)))


def test_the_report_sets_every_arm_against_the_best(tmp_path, monkeypatch):
    units = UNITS + [unit(seed, value, variant="patches") for seed, value in enumerate((9.0, 9.1, 9.2))]
    for number, each in enumerate(units):
        write_unit(tmp_path / str(number), each["overrides"])
    write_unit(tmp_path / "stopped", {"variant": "stopped", "seed": 0}, steps=(3,))
    write_unit(tmp_path / "waiting", {"variant": "waiting", "seed": 0}, steps=())
    monkeypatch.setattr(
        study, "score", lambda folder, extract, *, steps: {"frechet": units[int(folder.name)]["frechet"]}
    )
    monkeypatch.setattr("sys.argv", ["study", f"--experiment={tmp_path}"])
    study.main()
    found = json.loads((tmp_path / "study.json").read_text())["arms"]
    verdicts = {json.loads(name)["variant"]: arm["against_best"] for name, arm in found.items()}
    assert verdicts == {"dit": "itself", "uvit": "undecided", "patches": "decided"}


def test_an_experiment_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study", f"--experiment={tmp_path / 'none'}"])
    with pytest.raises(SystemExit):
        study.main()
    assert "found no finished work units in" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_images_are_resized_before_their_features_are_taken(tmp_path, monkeypatch):
    """One grey level stays, a step between two keeps its sides."""
    write_unit(tmp_path / "unit", {"seed": 0})
    images, seen = np.full((2, 4, 4, 3), 40, np.uint8), []
    images[1, :, 2:] = 200
    monkeypatch.setitem(study.FEATURES, "pixels", lambda: lambda x: seen.append(x))
    monkeypatch.setattr(study, "score", lambda folder, extract, *, steps: extract(images) or {"frechet": 1.0})
    for asked in ([], ["--resize=8"]):
        monkeypatch.setattr("sys.argv", ["study", f"--experiment={tmp_path}", *asked])
        study.main()
    as_it_was, (plain, step) = seen
    np.testing.assert_array_equal(as_it_was, images)
    assert plain.shape == (8, 8, 3) and plain.dtype == np.uint8 and (plain == 40).all()
    assert abs(int(step[0, 0, 0]) - 40) <= 8 and abs(int(step[0, 7, 0]) - 200) <= 8
    assert json.loads((tmp_path / "study.json").read_text())["resize"] == 8
