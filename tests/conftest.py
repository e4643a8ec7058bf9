"""Eight simulated devices, one compilation cache a session, and the smallest configs that still hold every kind of state."""

import atexit
import functools
import importlib.util
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _known(flags: tuple[str, ...]) -> list[str]:
    """Those of the flags that this jaxlib's XLA knows; it ends the process for one that it does not."""
    library = Path(importlib.util.find_spec("jaxlib").origin).parent / "libjax_common.so"
    if not library.exists():
        return []
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return [flag for flag in flags if code.find(flag[2:].partition("=")[0].encode()) >= 0]


def _set_environment() -> None:
    """Before jax is imported, here, in pytest-xdist's workers and in the processes that tests start.

    Most of a tiny model's compile time is LLVM's optimiser and the code that the newer of XLA's two emitters gives it: without
    them 2 seconds of 10 are left, for the same arithmetic.
    """
    cache = tempfile.mkdtemp(prefix="fid_imagegen-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    quick = _known(("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"))
    devices = "--xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = " ".join([devices, *quick, os.environ.get("XLA_FLAGS", "")])
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what pytest's own process has set
    _set_environment()
sys.path.insert(0, str(ROOT))  # configs/ and launch/ run from a checkout

import pytest  # noqa: E402


def _use_devices(monkeypatch, count: int) -> None:
    import jax

    from fid_imagegen.parallel import mesh

    monkeypatch.setattr(mesh, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:count]))


@pytest.fixture
def devices(monkeypatch):
    """devices(n): meshes made from here on have n of the eight devices; one is what most tests of the loop want."""
    return functools.partial(_use_devices, monkeypatch)


@pytest.fixture(scope="module")
def one_device():
    """Meshes of a module, its fixtures' too, have one of the eight devices."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use_devices(monkeypatch, 1)
        yield


@pytest.fixture(scope="session")
def tiny():
    """tiny(**{"key.key": value}) -> the config of a generator that compiles in seconds; `ct` has a target EMA."""
    from configs import common

    def make(objective_name="ct", **changes):
        config = common.base()
        config.data.update({"source": "synthetic", "image_size": 4, "channels": 1})
        config.model.update({"width": 16, "heads": 2, "extractor_depth": 1, "predictor_depth": 1})
        config.model.update({"function": "5x64", "function_width": 8, "function_depth": 2, "bands": 2, "groups": 2})
        config.objective = common.objective(objective_name)
        config.update({"batch_size": 8, "num_steps": 6, "ema_decays": (0.9,), "variational": True})
        config.log.update({"every": 1, "sample_every": 1000, "num_samples": 2, "tensorboard": False})
        config.checkpoint.update({"every": 2, "keep": 3})
        config.sharding.min_size = 0
        config.update_from_flattened_dict(changes)
        return config.lock()

    return make


@pytest.fixture
def toy(monkeypatch, devices, tiny):
    """toy(**changes) -> a config whose task is one matrix: what the loop does with any task, compiled in a blink.

    `toy.loss` may be replaced by loss(params, x [batch, 16], step); it runs on one device.
    """
    import jax
    import jax.numpy as jnp

    from fid_imagegen import tasks
    from fid_imagegen.diffusion.noise import example_keys

    class Toy:
        trained, tracked = ("generator",), {"target": ("generator", lambda step: 0.5)}

        def __init__(self, config):
            self.config = config

        @property
        def num_classes(self):
            return self.config.model.num_classes

        def tokenizer(self, source, path):
            return None

        def frozen(self):
            return make.frozen

        def init(self, key):
            return {"generator": {"kernel": jax.random.normal(key, (16, make.width))}}, {"seen": jnp.zeros(())}

        def loss(self, groups, model_state, batch, key, step):
            x = batch["image"].reshape(-1, 16) / 127.5 - 1
            noise = jax.vmap(lambda k: jax.random.normal(k, (16,)))(example_keys(key, batch["row"]))
            value = make.loss(groups["generator"], x + noise, step)
            return value, ({"seen": model_state["seen"] + jnp.mean(x)}, {"mean": jnp.mean(x)})

        def preview(self, groups, batch):
            return {"samples": jnp.tanh(batch["image"] / 255 + jnp.mean(groups["generator"]["kernel"]))}

    def make(**changes):
        # The rules of the real models name layers that a toy lacks.
        own = {"task": "toy", "sharding.rules": ((".*", "fsdp"),), "optimizers.generator.learning_rate": 0.01}
        return tiny(**(own | changes))

    make.loss = lambda params, x, step: jnp.mean((x @ params["kernel"]) ** 2)
    make.frozen, make.width = {}, 8
    monkeypatch.setitem(tasks.TASKS, "toy", Toy)
    devices(1)
    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder as `export` writes it, of an untrained generator."""
    import jax

    from configs import common
    from fid_imagegen import tasks
    from fid_imagegen.interop.safetensors_io import save_tree
    from fid_imagegen.training.runs import write_config

    folder = tmp_path_factory.mktemp("exported")
    config = common.runlocal(common.base())
    config.data.update({"source": "digits", "image_size": 8, "channels": 1})
    config.model.update({"patch": 4, "width": 16})
    write_config(folder, config.lock())
    save_tree(folder / "model.safetensors", jax.jit(tasks.build(config).init)(jax.random.key(0))[0], {})
    return folder


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): the next run is asked to stop before that step; None lets it run."""

    from fid_imagegen.training.preemption import Preemption

    def ask(step):
        monkeypatch.setattr(Preemption, "reached", lambda self, now: now == step)

    return ask


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """random_model(variant) -> stages of `configs/wuerstchen.py:runlocal`, exported, all weights random: heads start at zero."""
    import jax
    import numpy as np

    from configs import wuerstchen
    from fid_imagegen import tasks
    from fid_imagegen.data.tokenizer import train_bpe
    from fid_imagegen.interop.safetensors_io import save_tree
    from fid_imagegen.training import runs

    tokenizer = train_bpe(["a red star at the top left", "a blue circle in the centre"], vocabulary=300, length=16)

    @functools.cache
    def make(variant=""):
        root, config = tmp_path_factory.mktemp("model"), wuerstchen.get_config(f"{variant},runlocal")
        for number, stage in enumerate(config.stages):
            task = tasks.build(config[stage])
            params, stats = jax.jit(task.init)(jax.random.key(number))
            groups = {name: tree for name, tree in (params | stats).items() if "discriminator" not in name}
            rng = np.random.default_rng(number)  # jax would compile a program for each shape
            noisy = jax.tree.map(lambda x: x + 0.05 * np.abs(rng.standard_normal(x.shape, np.float32)), groups)  # noqa: B023
            runs.write_config(root / stage, config[stage])
            save_tree(root / stage / "model.safetensors", noisy, {})
            if "text" in task.trained:
                (root / stage / "tokenizer.json").write_text(tokenizer.json())
        return root

    return make


@pytest.fixture(scope="session")
def random_stages(random_model):
    """The three stages of `configs/wuerstchen.py:runlocal`."""
    return random_model()
