"""SIGKILLs at random moments; the resumed run against the uninterrupted one, bit for bit.

    python benchmarks/resume_campaign.py --kills 30

Compared: every array of the last checkpoint (parameters, target and evaluation EMAs, optimizer state, step), the losses, and the
indices and pixels of the examples of every step. A kill is "inside a save" when it leaves a checkpoint unfinished on disk.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file runs from a checkout, also as the trainer of `start`

# Consistency training with a target EMA, an evaluation EMA and RAdam, at the smallest size; a save every other step.
FLAGS = (
    f"--config={ROOT}/configs/cifar10_cm_func.py:paper,runlocal",
    "--config.data.source=synthetic",
    "--config.data.image_size=4",
    "--config.data.channels=1",
    "--config.distance=l2",
    "--config.pretrain.num_steps=0",
    "--config.model.width=16",
    "--config.model.cutoff=nyquist",
    "--config.model.function_width=8",
    "--config.model.function_depth=2",
    "--config.model.bands=2",
    "--config.model.groups=2",
    "--config.num_steps=120",
    "--config.checkpoint.every=2",
    "--config.log.every=1",
    "--config.log.sample_every=1000",
    "--config.log.tensorboard=False",
)


def child() -> None:
    """`fid_imagegen.train` with a note of each step's examples in WORKDIR/examples-PROCESS.jsonl.

    HOLD=STEP:FIFO in the environment: it waits at that step until something opens the FIFO for writing.
    """
    from absl import app

    from fid_imagegen import train
    from fid_imagegen.data import pipeline

    batches, (hold, _, fifo) = pipeline.batches, os.environ.get("HOLD", "").partition(":")

    def noted(*args, start_step, process_index, **kwargs):
        path = Path(train.WORKDIR.value) / f"examples-{process_index}.jsonl"
        rows = batches(*args, start_step=start_step, process_index=process_index, **kwargs)
        for step, batch in enumerate(rows, start_step):
            pixels = hashlib.sha256(batch["image"].tobytes()).hexdigest()
            line = {"step": step, "index": batch["index"].tolist(), "pixels": pixels}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if str(step) == hold:
                Path(fifo).read_text()
            yield batch

    pipeline.batches = noted
    app.run(train.main)


def start(workdir: Path, *flags: str, hold: str = "") -> subprocess.Popen:
    """A trainer of its own process on one device; its output goes to WORKDIR/output-PROCESS.txt."""
    index = next((flag.split("=")[1] for flag in flags if flag.startswith("--process_id=")), "0")
    workdir.mkdir(parents=True, exist_ok=True)
    # The last of two equal flags counts.
    one = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1", "HOLD": hold}
    with (workdir / f"output-{index}.txt").open("a") as output:
        command = [sys.executable, __file__, "child", f"--workdir={workdir}", *FLAGS, *flags]
        return subprocess.Popen(command, env=os.environ | one, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)


def examples(workdir: Path, process: int = 0) -> list[dict]:
    """What `child` noted, in the order it was read; a line cut off by a kill is left out."""
    path = workdir / f"examples-{process}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> bool:
    """Waits until `condition()`; False if the process ended before. TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return condition()
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds} s; see the output in the work directory")
        time.sleep(0.002)
    return True


def unfinished(workdir: Path) -> set[int]:
    """The saves on their way, or cut off when the process died, by inode: a name comes again when its step is saved again."""
    found = set()
    for path in (workdir / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found.add(path.stat().st_ino)
    return found


def last_state(workdir: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint, by path, as bytes."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    newest = max(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
    reader, path = ocp.PyTreeCheckpointer(), (workdir / "checkpoints" / str(newest) / "state").absolute()
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves}


def differences(workdir: Path, reference: Path) -> list[str]:
    """What of a finished run differs from the uninterrupted one: arrays, losses, examples."""
    ours, theirs = last_state(workdir), last_state(reference)
    found = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if losses(workdir) != losses(reference):
        found.append("metrics.jsonl")
    sequence = {line["step"]: line for line in examples(reference)}
    seen = examples(workdir)
    if {line["step"] for line in seen} != set(sequence) or any(line != sequence[line["step"]] for line in seen):
        found.append("examples")
    return found


def losses(workdir: Path) -> list[tuple]:
    """(step, loss, gradient norm) of every line of the log."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for a trainer to end well; RuntimeError shows the end of its output."""
    if process.wait(600):
        raise RuntimeError(f"found exit status {process.returncode}: {(workdir / 'output-0.txt').read_text()[-2000:]}")


def kill(process: subprocess.Popen, workdir: Path, before: set[int]) -> bool:
    """SIGKILL; whether it fell into a save, `before` being those cut off earlier."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    return bool(unfinished(workdir) - before)


def campaign(folder: Path, kills: int, seed: int, *flags: str) -> dict:
    """Runs trainers into `folder` and kills them until `kills` is reached, whole runs one after another."""
    rng, began = random.Random(seed), time.monotonic()
    reference = folder / "uninterrupted"
    finish(start(reference, *flags), reference)
    report = {"kills": 0, "inside_a_save": 0, "before_the_first_step": 0, "runs": 0, "differences": []}
    while report["kills"] < kills:
        workdir, finished = folder / f"run-{report['runs']}", False
        while not finished:
            read, cut_off = len(examples(workdir)), unfinished(workdir)
            # How often it saves is no part of what a run computes: now mostly inside saves, now mostly between them.
            process = start(workdir, *flags, f"--config.checkpoint.every={rng.choice((2, 2, 15))}")
            early = rng.random() < 0.2  # while it imports, restores or compiles
            if early or report["kills"] == kills:
                delay = rng.uniform(0, 6)
            else:
                wait_for(lambda w=workdir, n=read: len(examples(w)) > n + 1, process)
                delay = rng.uniform(0, 1.5)
            try:
                finished = process.wait(None if report["kills"] == kills else delay) == 0
                finish(process, workdir)
            except subprocess.TimeoutExpired:
                report["kills"] += 1
                report["inside_a_save"] += kill(process, workdir, cut_off)
                report["before_the_first_step"] += len(examples(workdir)) == read
        report["runs"] += 1
        report["differences"] += [f"{workdir.name}: {name}" for name in differences(workdir, reference)]
    return report | {"minutes": round((time.monotonic() - began) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        report = campaign(Path(folder), args.kills, args.seed)
    equal = not report["differences"]
    print(json.dumps(report | {"peer": "uninterrupted run", "bitwise_equal": equal}))
    print(
        f"{report['kills']} SIGKILLs, {report['inside_a_save']} inside a save, {report['before_the_first_step']} before the "
        f"first step, over {report['runs']} runs in {report['minutes']} min: bitwise {'equal' if equal else 'DIFFERENT'}"
    )
    sys.exit(not equal)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        del sys.argv[1]
        child()
    else:
        main()
