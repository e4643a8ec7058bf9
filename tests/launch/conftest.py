"""A config file with sweeps, and a fake trainer that obeys the real one's command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
import ml_collections

def get_config(arg=""):
    config = ml_collections.ConfigDict({
        "seed": 0, "steps": 2 if "runlocal" in arg.split(",") else 10, "mode": "ok", "shape": (1, 2), "names": ["a"],
        "optimizer": {"learning_rate": 1e-3},
    })
    config.lock()
    return config

def get_sweep():
    return {
        "lr": [{"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 3e-4}],
        "seed": [{"seed": 0}, {"seed": 1}],
        "same": [{"seed": 1}],
        "mode": [{"mode": "fail"}, {"mode": "ok"}],
        "quoting": [{"mode": "it's $HOME, \\"a b\\""}, {"shape": (3, 4)}],
        "arm": [{"variant": "small"}, {"variant": "large"}],
        "empty": [],
        "key": [{"optimizer.learning_rat": 1.0}],
        "type": [{"seed": 1.5}],
        "list": [{"names": ["b"]}],
        "text": [{"mode": 7}],
    }
"""

TRAINER = """
import json, os, pathlib, signal, sys

flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
index = flags.get("process_id", "0")

def save(*_):
    if "FINISH" in os.environ:
        open(os.environ["FINISH"]).read()  # a slow checkpoint: until the test lets it finish
    (workdir / f"saved_{index}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
mode = flags.get("config.mode", "ok")
print("flags", json.dumps(flags), flush=True)
if mode == "fail" and index == flags.get("failing", "0"):
    sys.exit("the fake loss is not finite")
if mode == "fail" or mode.startswith("wait"):
    if mode.startswith("wait"):
        pathlib.Path(mode[len("wait:"):]).open("w").write("ready\\n")  # a FIFO
    while True:
        signal.pause()
if index == "0":
    with (workdir / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            file.write(json.dumps({"step": step, "loss": float(flags.get("config.seed", 0)) + 1 / step}) + "\\n")
"""


@pytest.fixture(autouse=True)
def deadline():
    """A process that nobody stops fails its test instead of hanging it."""

    def late(*_) -> None:
        raise TimeoutError("the test waits for a process that does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def trainer(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "fake_trainer.py"
    path.write_text(TRAINER)
    return sys.executable, "-S", str(path)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository to run in, also when git itself (a hook) started the tests."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    return tmp_path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts fake programs (name -> bash text) in front of PATH. They find a folder for their notes in $NOTES."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("NOTES", str(tmp_path))

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return put
