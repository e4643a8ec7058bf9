"""The SLURM and Cloud TPU executors: what they print, and what they do with fake programs on PATH."""

import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from launch import records
from launch.errors import LaunchError
from launch.executors import slurm, tpu_vm
from launch.experiment import Requirements, create_experiment

REPOSITORY = Path(__file__).parents[2]
SRUN = 'printf "%q " "$@" >> "$NOTES/srun"\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"'
SCONTROL = 'echo "$@" >> "$NOTES/scontrol"'


@pytest.fixture
def plan(config, tmp_path):
    def create(*sweeps: str, fixed=None, root=str(tmp_path / "my runs"), **needs):
        return create_experiment(config, sweeps, fixed, root=root, requirements=Requirements(**needs))

    return create


def test_slurm_options(plan, tmp_path):
    text = slurm.render(plan("lr", "seed", processes=16, nodes=2, gpus_per_node=8, sbatch=("--partition=gpu",)))
    options = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=toy",
        "--array=1-4",
        "--nodes=2",
        "--ntasks=16",
        "--gpus-per-node=8",
        f"--output={tmp_path}/my runs/toy/slurm-%A_%a.txt",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        "--partition=gpu",
    ]
    assert "--gpus-per-node" not in slurm.render(plan())


def run_task(experiment, trainer, index: int) -> subprocess.Popen:
    """What SLURM does with one array task."""
    records.prepare(experiment, "slurm")
    env = os.environ | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", "-c", slurm.render(experiment, trainer)], cwd=REPOSITORY, env=env)


def test_slurm_script_runs_its_work_unit(plan, trainer, programs, tmp_path):
    programs("srun", SRUN)
    experiment = plan("quoting")
    assert run_task(experiment, trainer, 1).wait() == 0
    called = shlex.split((tmp_path / "srun").read_text())
    unit = experiment.units[0]
    assert called[0] == "--kill-on-bad-exit=1" and f"--output={unit.records}/log_%t.txt" in called
    assert called[-len(unit.job.args) - 1 :] == [*unit.job.args, "--distributed=auto"]
    assert '--config.mode=it\'s $HOME, "a b"' in called
    assert records.read_json(unit.records / "status.json")["state"] == "succeeded"


def test_slurm_script_reports_failure(plan, trainer, programs):
    programs("srun", SRUN)
    experiment = plan("mode")
    assert run_task(experiment, trainer, 1).wait() == 1
    status = records.read_json(experiment.units[0].records / "status.json")
    assert (status["state"], status["exit_codes"]) == ("failed", [1])


def test_slurm_script_saves_and_requeues_at_the_time_limit(plan, trainer, programs, tmp_path, monkeypatch):
    programs("srun", SRUN)
    programs("scontrol", SCONTROL)
    fifo, finish = tmp_path / "ready", tmp_path / "finish"
    os.mkfifo(fifo)
    os.mkfifo(finish)
    monkeypatch.setenv("FINISH", str(finish))
    experiment = plan(fixed={"mode": f"wait:{fifo}"})
    task = run_task(experiment, trainer, 1)
    assert fifo.open().read() == "ready\n"
    task.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):  # the checkpoint is not complete: no requeue yet
        task.wait(timeout=0.5)
    finish.write_text("")
    assert task.wait() == 0
    folder = experiment.units[0].records
    assert (folder / "saved_0").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    assert records.read_json(folder / "status.json")["state"] == "pending"


def test_slurm_submits_the_script_it_prints(plan, programs, tmp_path, monkeypatch):
    experiment = plan("lr")
    records.prepare(experiment, "slurm")
    with monkeypatch.context() as bare, pytest.raises(LaunchError, match="no sbatch on PATH"):
        bare.setenv("PATH", str(tmp_path))
        slurm.submit(experiment)
    programs("sbatch", 'cp "$1" "$NOTES/submitted"')
    assert slurm.submit(experiment) == 0
    assert (tmp_path / "submitted").read_text() == slurm.render(experiment)


def commands(script: str) -> list[list[str]]:
    """The gcloud lines of a script, as argv."""
    return [shlex.split(line)[3:] for line in script.splitlines() if line.startswith("gcloud compute tpus ")]


def test_tpu_vm_commands(plan):
    experiment = plan("quoting", root="gs://bucket/runs", accelerator="v5p-32", zone="us-east5-a", spot=True)
    unit = experiment.units[0]
    create, copy, install, run = commands(tpu_vm.script(experiment, unit))
    assert create == [
        *("queued-resources", "create", "toy-001", "--node-id=toy-001", "--accelerator-type=v5p-32"),
        *("--runtime-version=v2-alpha-tpuv5", "--spot", "--zone=us-east5-a", "--quiet"),
    ]
    assert copy[:5] == ["tpu-vm", "scp", "/tmp/toy-001.tar.gz", "toy-001:", "--worker=all"]
    assert "pip install" in install[4] and "'.[tpu]'" in install[4]
    assert run[:4] == ["tpu-vm", "ssh", "toy-001", "--worker=all"] and run[5] == "--zone=us-east5-a"
    remote = shlex.split(run[4].removeprefix("--command="))  # what the worker's shell makes of it
    assert remote == ["cd", "fid_imagegen", "&&", *unit.job.command(tpu_vm.TRAINER, "auto")]
    assert f"--workdir=gs://bucket/runs/toy/{unit.name}" in remote and '--config.mode=it\'s $HOME, "a b"' in remote
    trap = next(line for line in tpu_vm.script(experiment, unit).splitlines() if line.endswith("EXIT"))
    assert shlex.split(shlex.split(trap)[1])[3:6] == ["queued-resources", "delete", "toy-001"]
    assert "--spot" not in tpu_vm.render(plan(accelerator="v6e-8", zone="z"))
    assert "pass --root gs://" in tpu_vm.render(plan(accelerator="v6e-8", zone="z"))


GCLOUD = """
line=$(printf '%q ' "$@"); echo "$line" >> "$NOTES/gcloud"  # one write: slices are used at the same time
case "$*" in *describe*) echo "${STATE:-ACTIVE}" ;; *create*) exit "${CREATE:-0}" ;;
*train*)
  if [ -v READY ]; then echo ready > "$READY"; read < "$NEVER"; fi
  exit "${TRAIN:-0}" ;;
esac
"""


@pytest.mark.parametrize(
    "failure, state, verbs",
    [
        ({}, "succeeded", ["create", "describe", "scp", "ssh", "ssh", "delete"]),
        ({"TRAIN": "1"}, "failed", ["create", "describe", "scp", "ssh", "ssh", "delete"]),
        ({"STATE": "SUSPENDED"}, "failed", ["create", "describe", "delete"]),
        ({"CREATE": "1"}, "failed", ["create"]),  # the name may be somebody else's: delete nothing
    ],
)
def test_tpu_vm_deletes_what_it_created(plan, programs, repository, monkeypatch, failure, state, verbs):
    programs("gcloud", GCLOUD)
    for name, value in failure.items():
        monkeypatch.setenv(name, value)
    experiment = plan(root="gs://bucket/runs", accelerator="v5litepod-16", zone="z")
    records.prepare(experiment, "tpu_vm")
    assert tpu_vm.submit(experiment) == (state == "failed")
    calls = [shlex.split(line)[2:] for line in (repository / "gcloud").read_text().splitlines()]
    assert [call[1] for call in calls] == verbs
    assert records.read_json(experiment.units[0].records / "status.json")["state"] == state


def test_tpu_vm_deletes_the_slices_when_it_is_stopped(plan, programs, repository, monkeypatch):
    programs("gcloud", GCLOUD)
    for name in ("READY", "NEVER"):
        os.mkfifo(repository / name)
        monkeypatch.setenv(name, str(repository / name))
    experiment = plan("seed", root="gs://bucket/runs", accelerator="v5p-32", zone="z")
    records.prepare(experiment, "tpu_vm")

    def stop() -> None:
        with open(os.open("READY", os.O_RDWR)) as file:
            assert [file.readline(), file.readline()] == ["ready\n"] * 2
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert tpu_vm.submit(experiment) == 130
    thread.join()
    calls = [shlex.split(line) for line in (repository / "gcloud").read_text().splitlines()]
    assert sorted(call[4] for call in calls if call[3] == "delete") == ["toy-001", "toy-002"]
    assert {records.read_json(unit.records / "status.json")["state"] for unit in experiment.units} == {"pending"}


def test_tpu_vm_refuses(plan, monkeypatch, tmp_path):
    with pytest.raises(LaunchError, match="work directory .* Pass --root gs://"):
        tpu_vm.submit(plan(accelerator="v5p-32", zone="z"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no gcloud on PATH"):
        tpu_vm.submit(plan(root="gs://b", accelerator="v5p-32", zone="z"))
