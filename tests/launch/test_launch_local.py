"""The local executor with a fake trainer: success, failure, signals; manifests, statuses and the table they make."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from launch import executors, records, run, table
from launch.errors import LaunchError
from launch.executors import local
from launch.executors.processes import run_gang
from launch.experiment import Requirements, create_experiment


@pytest.fixture
def launch(config, trainer, tmp_path, monkeypatch):
    """Runs the command line with the fake trainer in the real one's place."""

    def main(*line: str, prefix=trainer) -> int:
        fake = SimpleNamespace(submit=partial(local.submit, trainer=prefix, grace=0.2), render=local.render)
        monkeypatch.setitem(executors.EXECUTORS, "local", fake)
        return run.main(["--config", config, "--root", str(tmp_path / "runs"), *line])

    return main


def flags_of(log) -> dict[str, str]:
    return json.loads(log.read_text().splitlines()[0].removeprefix("flags "))


def test_a_sweep_of_two_processes_each(launch, config, tmp_path, capsys):
    assert launch("--sweep", "seed", "--processes", "2", "--config.steps=3") == 0
    folder = tmp_path / "runs/toy/002-seed=1"
    first, second = (flags_of(folder / f"log_{index}.txt") for index in (0, 1))
    assert (first.pop("process_id"), second.pop("process_id")) == ("0", "1")
    assert first == second
    assert first.pop("distributed").startswith("127.0.0.1:")
    assert first == {
        "config": config,
        "workdir": str(folder),
        "config.steps": "3",
        "config.seed": "1",
        "num_processes": "2",
    }
    assert records.read_json(folder / "status.json")["state"] == "succeeded"
    assert records.read_json(folder / "status.json")["exit_codes"] == [0, 0]
    assert "002-seed=1: succeeded" in capsys.readouterr().out


def test_one_process_needs_no_distributed(launch, tmp_path):
    assert launch() == 0
    flags = flags_of(tmp_path / "runs/toy/001/log_0.txt")
    assert flags["distributed"] == "off" and "process_id" not in flags


def test_a_failing_unit_is_reported_and_the_next_still_runs(launch, trainer, tmp_path, capsys):
    assert launch("--sweep", "mode", "--processes", "2", prefix=(*trainer, "--failing=1")) == 1
    bad, good = tmp_path / "runs/toy/001-mode=fail", tmp_path / "runs/toy/002-mode=ok"
    assert records.read_json(bad / "status.json")["state"] == "failed"
    assert records.read_json(bad / "status.json")["exit_codes"] == [0, 1]
    assert (bad / "saved_0").exists()  # process 0 waited for its dead peer until it was terminated
    assert records.read_json(good / "status.json")["state"] == "succeeded"
    error = capsys.readouterr().err
    assert "001-mode=fail: process 1 failed (1)" in error and "the fake loss is not finite" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_the_run_resumes(launch, tmp_path, number):
    fifo, handlers = tmp_path / "ready", [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    os.mkfifo(fifo)

    def interrupt() -> None:
        with open(os.open(fifo, os.O_RDWR)) as file:  # for writing too: no end of file between the two processes
            assert [file.readline(), file.readline()] == ["ready\n"] * 2
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    line = ("--processes", "2", "--sweep", "seed", f"--config.mode=wait:{fifo}")
    assert launch(*line) == 130
    thread.join()
    first, second = tmp_path / "runs/toy/001-seed=0", tmp_path / "runs/toy/002-seed=1"
    assert (first / "saved_0").exists() and (first / "saved_1").exists()
    assert records.read_json(first / "status.json")["state"] == "pending"
    assert records.read_json(second / "status.json")["state"] == "pending" and not (second / "log_0.txt").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_process_that_ignores_termination_is_killed(tmp_path):
    fifo, log = tmp_path / "ready", tmp_path / "log"
    os.mkfifo(fifo)
    stubborn = f"trap '' TERM; echo ready > {fifo}; while true; do sleep 1; done"
    dies = f"read < {fifo}; exit 3"
    gang = [["bash", "-c", stubborn], ["bash", "-c", dies]]
    assert run_gang(gang, [log, log], threading.Event(), grace=0.1) == ([-signal.SIGKILL, 3], 1)


def test_the_same_command_resumes_and_another_is_refused(launch, tmp_path, capsys):
    folder = tmp_path / "runs/toy/001"
    assert launch() == launch() == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4 and len(flags_of(folder / "log_0.txt")) == 3
    assert len(records.read_json(folder / "manifest.json")["earlier"]) == 1
    assert launch("--config.steps=3") == 2
    assert "{'steps': '3'} to resume" in capsys.readouterr().err
    assert launch("--config.steps=3", "--experiment", "other") == 0


def test_manifest(config, repository):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    (repository / "file").write_text("1\n")
    for command in (["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    experiment = create_experiment(config, ["quoting"], {"steps": "3"}, requirements=Requirements(processes=2))
    records.prepare(experiment, "local")
    unit = experiment.units[1]
    manifest = records.read_json(unit.records / "manifest.json")
    assert manifest["argv"] == ["python", "-m", "fid_imagegen.train", *unit.job.args]
    assert (manifest["fixed"], manifest["overrides"]) == ({"steps": "3"}, {"shape": [3, 4]})
    assert len(manifest["git_commit"]) == 40 and manifest["git_diff_sha256"] is None
    assert manifest["packages"].keys() == set(records.PACKAGES) and manifest["packages"]["jax"]
    assert records.read_json(unit.records / "status.json")["state"] == "pending"

    (repository / "file").write_text("2\n")
    records.prepare(experiment, "local")  # a tuple that became a list in JSON is still the same run
    diff = subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=True).stdout
    assert records.read_json(unit.records / "manifest.json")["git_diff_sha256"] == hashlib.sha256(diff).hexdigest()
    assert not list(unit.records.glob(".*"))  # no temporary file stays


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    records.write_status(tmp_path, "running")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        records.write_status(tmp_path, "failed", [1])
    assert records.read_json(tmp_path / "status.json")["state"] == "running"


def test_table(launch, tmp_path, capsys):
    launch("--sweep", "seed,lr")
    folder = tmp_path / "runs/toy/002-seed=0,learning_rate=0.0003"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "fid": 12.3456789, "note": "text", "done": true}\n{"step": 5, "los')
    capsys.readouterr()
    line = ["table", "--root", str(tmp_path / "runs"), "--experiment", "toy"]
    assert run.main([*line, "--csv", str(tmp_path / "t.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["work_unit", "seed", "optimizer.learning_rate", "status", "step", "fid", "loss"]
    assert lines[2].split() == [folder.name, "0", "0.0003", "succeeded", "4", "12.346", "0.5"]
    assert lines[4].split()[-3:] == ["succeeded", "2", "1.5"]
    assert all(line.find("succeeded") == lines[0].find("status") for line in lines[1:])
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.DictReader(file))[1]["fid"] == "12.3456789"
    assert run.main([*line, "--metrics", "loss"]) == 0
    assert "fid" not in capsys.readouterr().out
    assert run.main([*line, "--metrics", "los"]) == 2
    assert "Expected one of fid, loss" in capsys.readouterr().err
    with pytest.raises(LaunchError, match=r"no experiment 'tony'.*\(toy\)"):
        table.rows(tmp_path / "runs", "tony")
