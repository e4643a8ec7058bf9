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


def test_a_report_of_an_experiment(tmp_path, monkeypatch):
    for number, (variant, batch) in enumerate([("unet", 32), ("dit", 32), ("dit", 128)]):
        unit = tmp_path / f"{number}"
        unit.mkdir()
        (unit / "manifest.json").write_text(json.dumps({"overrides": {"variant": variant, "batch_size": batch}}))
        text = "".join(json.dumps(line) + "\n" for line in lines(1 + number + np.arange(80) / 80))
        (unit / "metrics.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["curves", "--experiment", str(tmp_path)])
    curves.main()
    report = json.loads((tmp_path / "curves.json").read_text())
    assert [(each["variant"], each["batch_size"], len(each["means"])) for each in report] == [
        ("unet", 32, 40),
        ("dit", 32, 40),
        ("dit", 128, 40),
    ]
    assert report[0]["ratio"] == pytest.approx(1.98, rel=0.01) and (tmp_path / "curves.png").stat().st_size > 1000
