"""What a loss curve's oscillation is, and that batch sizes compare."""

import json

import numpy as np
import pytest

from benchmarks import curves


def lines(losses):
    return [{"step": step, "loss": float(loss)} for step, loss in enumerate(losses, start=1)]


def test_a_smooth_curve_does_not_oscillate_and_a_wave_does():
    steps = np.arange(400)
    smooth, wave = np.exp(-steps / 400), np.exp(0.5 * (-1.0) ** (steps // 10))
    assert curves.oscillation(curves.windows(lines(smooth))) < 1e-3
    assert curves.oscillation(curves.windows(lines(wave))) == pytest.approx(1.0, rel=0.01)
    assert curves.oscillation(curves.windows(lines(7 * wave))) == pytest.approx(1.0, rel=0.01)


def test_a_start_that_settles_does_not_count():
    losses = np.concatenate([np.exp((-1.0) ** (np.arange(200) // 10)), np.ones(200)])
    assert curves.oscillation(curves.windows(lines(losses))) == 0


def test_too_few_losses_are_refused():
    with pytest.raises(ValueError, match="found 39 logged losses, expected at least 40"):
        curves.windows(lines(np.ones(39)))


def write_run(folder, losses, batch_size, rate=10.0):
    (folder / "checkpoints" / "7").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"batch_size": batch_size, "num_steps": 7}))
    text = "".join(json.dumps(line | {"images_per_second": rate}) + "\n" for line in lines(losses))
    (folder / "metrics.jsonl").write_text(text)


def report(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["curves", "--experiment", str(tmp_path), *arguments])
    curves.main()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    return json.loads((tmp_path / "curves.json").read_text())


def test_a_report_of_an_experiment(tmp_path, monkeypatch):
    for number, (variant, batch) in enumerate([("unet", 32), ("dit", 32), ("dit", 128)]):
        write_run(tmp_path / f"{number}", 1 + number + np.arange(80) / 80, batch)
        overrides = {"variant": variant, "batch_size": batch, "seed": number}
        (tmp_path / f"{number}" / "manifest.json").write_text(json.dumps({"overrides": overrides}))
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "manifest.json").write_text(json.dumps({"overrides": {"variant": "uvit", "seed": 0}}))
    found = report(tmp_path, monkeypatch)
    assert [(each["arm"], each["batch_size"], len(each["means"])) for each in found] == [
        ("unet", 32, 40),
        ("dit", 32, 40),
        ("dit", 128, 40),
    ]
    assert found[0]["ratio"] == pytest.approx(1.98, rel=0.01)


def test_pre_training_takes_its_time_too(tmp_path, monkeypatch):
    """80 steps of 20 images at 10 images/s are 160 seconds; 30 steps of 5 before them are 15."""
    for name in ("none", "pretrained"):
        write_run(tmp_path / name, np.linspace(2, 1, 80), 20)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"overrides": {"variant": name, "seed": 0}}))
    write_run(tmp_path / "pretrained" / "pretrain", np.ones(30), 5)
    found = {each["arm"]: each["seconds"] for each in report(tmp_path, monkeypatch, "--against", "seconds")}
    assert found["none"][0] == pytest.approx(4) and found["none"][-1] == pytest.approx(160)
    np.testing.assert_allclose(np.subtract(found["pretrained"], found["none"]), 15)
