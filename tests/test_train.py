"""The command itself, in processes of its own: stopped, killed, and run again."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import resume_campaign
from benchmarks.resume_campaign import (
    FLAGS,
    ROOT,
    campaign,
    differences,
    examples,
    finish,
    kill,
    losses,
    unfinished,
    wait_for,
)
from fid_imagegen.data import pipeline, sources

# Compiles in half the time of a consistency step, which the slow campaign kills.
RECONSTRUCTION = ("--config.task=reconstruction", "--config.num_steps=24")
RARELY, OFTEN = "--config.checkpoint.every=1000", "--config.checkpoint.every=2"


@pytest.fixture(scope="module")
def start():
    """`resume_campaign.start`; what still runs when a test has failed is ended."""
    running = []

    def run(*args, **kwargs):
        running.append(resume_campaign.start(*args, **kwargs))
        return running[-1]

    yield run
    for process in running:
        process.kill()  # no effect on one that has ended
        process.wait()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The work directory of a run of 24 steps that nothing stopped."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir, *RECONSTRUCTION, RARELY), workdir)
    return workdir


@pytest.fixture
def fifos(tmp_path):
    """One a process: a single write would let go of all that wait for the same one, or of one."""
    for index in (0, 1):
        os.mkfifo(tmp_path / f"fifo-{index}")
    return [tmp_path / f"fifo-{index}" for index in (0, 1)]


def output(workdir, process=0):
    return (workdir / f"output-{process}.txt").read_text()


def at_step(workdir, step, *processes):
    """Waits until every process holds the batch of that step."""
    for index, process in enumerate(processes):
        reached = lambda i=index: any(line["step"] == step for line in examples(workdir, i))  # noqa: E731
        assert wait_for(reached, process), output(workdir, index)


@pytest.mark.slow  # one of two processes, below, is stopped in every suite
def test_sigterm_saves_and_the_same_command_goes_on(start, uninterrupted, tmp_path, fifos):
    workdir = tmp_path / "run"
    process = start(workdir, *RECONSTRUCTION, RARELY, hold=f"5:{fifos[0]}")
    at_step(workdir, 5, process)
    process.send_signal(signal.SIGTERM)
    fifos[0].write_text("go on")
    assert process.wait(120) == 0
    assert "stopped and saved" in output(workdir)
    # The step whose batch was at hand is done, and saved.
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
    # A run that is 18 steps behind shows what the comparison sees.
    found = differences(workdir, uninterrupted)
    for kind in ("['params']", "['ema']", "['opt_state']", "['step']", "metrics.jsonl", "examples"):
        assert any(name.startswith(kind) for name in found)
    finish(start(workdir, *RECONSTRUCTION, RARELY), workdir)
    assert f"finished: {workdir}" in output(workdir)
    assert [line["step"] for line in examples(workdir)] == list(range(24))
    assert differences(workdir, uninterrupted) == []


def test_sigkill_and_the_same_command_goes_on(start, uninterrupted, tmp_path):
    """Once inside a save, once after a few steps; benchmarks/resume_campaign.py does it at 30 random moments."""
    workdir = tmp_path / "run"
    process = start(workdir, *RECONSTRUCTION, OFTEN)
    assert wait_for(lambda: len(examples(workdir)) > 4 and unfinished(workdir), process), output(workdir)
    kill(process, workdir, set())
    read = len(examples(workdir))
    process = start(workdir, *RECONSTRUCTION, OFTEN)
    assert wait_for(lambda: len(examples(workdir)) > read + 5, process), output(workdir)
    kill(process, workdir, set())
    finish(start(workdir, *RECONSTRUCTION, OFTEN), workdir)
    assert differences(workdir, uninterrupted) == []


def two_processes(start, workdir, held, fifos):
    """Both processes of a run on two devices, held at a step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--distributed=localhost:{port}", "--num_processes=2", RARELY, "--config.task=reconstruction"]
    flags += ["--config.num_steps=1000000"]  # of no meaning to reconstruction at a constant rate
    return [start(workdir, *flags, f"--process_id={i}", hold=f"{held}:{fifo}") for i, fifo in enumerate(fifos)]


def test_sigterm_to_one_of_two_processes_saves_on_both_at_one_step(start, uninterrupted, tmp_path, fifos):
    workdir, reached = tmp_path / "run", 0
    for asked in (1, 0):
        held, before = reached + 4, reached
        both = two_processes(start, workdir, held, fifos)
        at_step(workdir, held, *both)
        both[asked].send_signal(signal.SIGTERM)
        for fifo in fifos:
            fifo.write_text("go on")
        assert [process.wait(120) for process in both] == [0, 0], output(workdir)
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        reached = steps[-1]
        assert reached > held and steps == ([before, reached] if before else [reached])
    assert output(workdir).count("stopped and saved") == 2 and "stopped and saved" not in output(workdir, 1)
    # Every step was done once, on halves of the rows one process would read.
    data = json.loads((workdir / "config.json").read_text())["data"]
    Data = collections.namedtuple("Data", data)
    source = sources.make_source(Data(**data))
    rows = pipeline.batches(source, Data(**data), seed=0, batch_size=8)
    halves = [examples(workdir, process) for process in (0, 1)]
    assert [line["step"] for line in halves[0]] == [line["step"] for line in halves[1]] == list(range(reached))
    for first, second, batch in zip(*halves, rows, strict=False):
        assert first["index"] + second["index"] == batch["index"].tolist()
    ours, one = losses(workdir), losses(uninterrupted)
    assert [step for step, *_ in ours] == list(range(1, reached + 1))
    both = min(len(ours), len(one))
    np.testing.assert_allclose(ours[:both], one[:both], rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.modle.width=3"], "modle"),
        (["--config.batch_size=7", "--config.accumulate=2"], "found batch size 7 on a mesh of"),
    ],
)
def test_mistakes_are_named_and_write_nothing(tmp_path, flags, message):
    command = [sys.executable, "-m", "fid_imagegen.train", *FLAGS, *flags, f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_thirty_kills(tmp_path, capsys):
    report = campaign(tmp_path, 30, 0)
    with capsys.disabled():
        print(f"\n{report}")
    assert report["differences"] == []
    assert report["kills"] == 30 and report["inside_a_save"] >= 5 and report["kills"] - report["inside_a_save"] >= 5
