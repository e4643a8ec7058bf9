"""Processes that live and die together, and the signals that reach them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

POLL = 0.05  # seconds
TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of a program, of a shell script


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets instead of ending the launcher: runs save first. A second ends it."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_gang(
    commands: Sequence[Sequence[str]],
    logs: Sequence[Path],
    stop: threading.Event,
    grace: float,
    whole_group: bool = False,
) -> tuple[list[int], int | None]:
    """Runs the commands side by side, appending each one's output to its log.

    One that fails leaves the others waiting in a collective, so they get `grace` seconds to notice, then SIGTERM, and
    after as long again SIGKILL. `stop` forwards SIGTERM at once and waits for as long as saving takes. Each process has
    its own session, so the terminal's Ctrl-C reaches the launcher only, and a trainer's data workers live until it has
    saved; `whole_group` signals such children too, for scripts that wait on them.

    Returns the exit codes, and the index of the first process that failed (being stopped is no failure), if one did.
    """
    processes: list[subprocess.Popen] = []
    culprit, deadline, sent = None, float("inf"), set()

    def send(number: int) -> None:
        for process in processes:
            if process.poll() is None and (process.pid, number) not in sent:
                sent.add((process.pid, number))
                (os.killpg if whole_group or number == signal.SIGKILL else os.kill)(process.pid, number)

    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("ab") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
        while True:
            codes = [process.poll() for process in processes]
            failed = [i for i, code in enumerate(codes) if code and not (stop.is_set() and code in TERMINATED)]
            if failed and culprit is None:
                culprit, deadline = failed[0], time.monotonic() + grace
            if None not in codes:
                return codes, culprit
            if stop.is_set() or time.monotonic() > deadline:
                send(signal.SIGTERM)
            if time.monotonic() > deadline + grace:
                send(signal.SIGKILL)
            time.sleep(POLL)
    finally:  # a second Ctrl-C, or a program that does not start, must leave nothing behind
        send(signal.SIGKILL)
