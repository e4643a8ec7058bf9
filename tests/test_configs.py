import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import common
from fid_imagegen import tasks
from fid_imagegen.training import phases
from fid_imagegen.training.checkpoint import load_groups

FOLDER = Path(__file__).resolve().parents[1] / "configs"
FILES = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py"))
FOUND = sorted(".".join(file.parts) for file in FILES if file.name not in ("__init__", "common"))
STAGED = [name for name in FOUND if "wuerstchen" in name]  # three configs in one
NAMES = [name for name in FOUND if name not in (*STAGED, "augmentation_net")]  # image functions
# Variants of what another adds.
BESIDE = {"tuned": "jumps,b_jumps,tuned", "continuous": "jumps,b_jumps,continuous"}
BESIDE["weighted"] = f"{BESIDE['continuous']},weighted"
JSON_TYPES = (bool, int, float, str, type(None))


def _module(name):
    return importlib.import_module(f"configs.{name}")


def _arguments(name):
    """Every argument a config knows, by asking for one it does not."""
    with pytest.raises(ValueError, match="found config argument 'nonsense'") as error:
        _module(name).get_config("nonsense")
    return json.loads(str(error.value).split("expected of ")[1].replace("'", '"'))


def _cases(names):
    owns = ((name, BESIDE.get(own, own)) for name in names for own in _arguments(name))
    cases = {(name, arg) for name, own in owns for arg in ("", own, f"{own},runlocal")}
    return sorted(case for case in cases if case[1] != "runlocal,runlocal")


CASES = _cases(NAMES)


def _leaves(value, prefix=""):
    if isinstance(value, (dict, ConfigDict)):
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, (list, tuple)):
        for child in value or (None,):
            yield from _leaves(child, prefix)
    else:
        yield prefix, value


def test_all_configs_are_seen():
    assert {"digits_cm_func", "cifar10_cm_func", "own_images", "celeba64_cm_func", "celeba128_cm_func"} <= set(NAMES)
    for name in ("cifar10_cm_func", "celeba64_cm_func", "celeba128_cm_func"):
        assert "paper" in _arguments(name)


@pytest.mark.parametrize("name", ["cifar10_cm_func", "celeba64_cm_func", "celeba128_cm_func", "own_images"])
def test_functions_are_of_pixels_and_the_papers_global(name):
    config = _module(name).get_config()
    kind = tasks.build(config).model.kind
    assert (type(kind).__name__, kind.rows * kind.patch) == ("PixelMLP", config.data.image_size)
    assert (config.variational, config.pretrain.num_steps) == (False, 0)
    if "paper" in _arguments(name):
        paper = _module(name).get_config("paper")
        assert (paper.model.function, paper.variational) == ("5x256", True) and paper.pretrain.num_steps > 10_000


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_every_variant_is_locked_complete_and_json(name, arg):
    config = _module(name).get_config(arg)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.model.widht = 3
    with pytest.raises(AttributeError):
        config.optimizers.generator.learning_rat = 3
    # Every key there is stands in base(): none is added by a config, none is missing, but for an objective and groups of its own.
    task = tasks.build(config)
    own = ("objective.", *(f"{part}.{group}" for part in ("optimizers", "init") for group in task.objective.own))
    keys = lambda c: {key for key, _ in _leaves(c) if not key.startswith(own)}  # noqa: E731
    assert keys(config) == keys(common.base())
    assert set(task.trained) == set(config.optimizers) <= set(config.init)
    assert set(config.objective) == {"name", *common.OBJECTIVES[config.objective.name]}
    wrong = {key: type(value) for key, value in _leaves(config.to_dict()) if not isinstance(value, JSON_TYPES)}
    assert not wrong
    stored = json.loads(config.to_json())
    assert json.loads(ConfigDict(stored).to_json()) == stored


def _written(kind):
    module = _module("wuerstchen")
    if kind.endswith("_jumps"):
        return module.twin(getattr(module, kind.removesuffix("_jumps"))())
    return getattr(module, kind)()


@pytest.mark.parametrize(("name", "arg"), _cases(STAGED))
def test_every_staged_variant_is_locked_complete_and_json(name, arg):
    config = _module(name).get_config(arg)
    assert config.is_locked
    wrong = {key: type(value) for key, value in _leaves(config.to_dict()) if not isinstance(value, JSON_TYPES)}
    assert not wrong
    stored = ConfigDict(json.loads(config.to_json()))
    for stage in config.stages:
        with pytest.raises(AttributeError):
            config[stage].num_step = 3
        # Fields of networks and objectives are checked by building them; other keys are those that the stage is written with.
        kind = config[stage].task
        own = ("model", "first_stage", "init", "optimizers", *(("objective",) if kind.endswith("_jumps") else ()))
        keys = lambda c: {key for key, _ in _leaves(c) if key.split(".")[0] not in own}  # noqa: B023, E731
        assert keys(config[stage]) == keys(_written(kind))
        task = tasks.build(stored[stage])  # a tuple is a list in a work directory
        assert stage.startswith(kind) and set(task.trained) == set(stored[stage].optimizers)
        assert set(task.trained) <= set(stored[stage].init) <= {*task.trained, "vqgan", "compressor", "teacher"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arg"), [case for case in _cases(STAGED) if case[1].endswith("runlocal")])
def test_every_staged_variant_trains_all_its_stages(name, arg, devices, tmp_path):
    devices(1)
    config = _module(name).get_config(arg)
    assert phases.run(config, tmp_path)
    assert [load_groups(tmp_path / stage)[0] for stage in config.stages] == [8] * len(config.stages)


@pytest.mark.parametrize("arg", ["", "cifar10", "runlocal", "cifar10,runlocal"])
def test_the_net_of_augmentations_fits_the_generators(arg):
    config = _module("augmentation_net").get_config(arg)
    assert config.is_locked and _arguments("augmentation_net") == ["cifar10", "runlocal"]
    stored, own = ConfigDict(json.loads(config.to_json())), ("model", "optimizers", "init")
    keys = lambda c: {key for key, _ in _leaves(c) if key.split(".")[0] not in own}  # noqa: E731
    assert keys(stored) == keys(common.training("augmentation_net"))
    params, _ = jax.eval_shape(tasks.build(stored).init, jax.random.key(0))
    theirs = _module("cifar10_cm_func" if "cifar10" in arg else "digits_cm_func").get_config().unlock()
    theirs.distance = "augmentations"
    wanted = tasks.build(theirs).frozen()["augmentation_net"]
    assert jax.tree.map(lambda x: x.shape, params["augmentation_net"]) == jax.tree.map(lambda x: x.shape, wanted)
    assert stored.data.channels == theirs.data.channels and stored.data.image_size == theirs.data.image_size


def test_every_network_and_baseline_has_its_config():
    assert {"transformer", "b_no_text", "previewer", "ldm", "text_only"} <= set(_arguments("wuerstchen"))
    assert {"transformer", "b_text", "previewer", "ldm", "text_only"} <= set(_arguments("shapes_wuerstchen"))


def _parameters(config, stage):
    params, _ = jax.eval_shape(tasks.build(config[stage]).init, jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(params[stage]))


@pytest.mark.parametrize(("name", "within"), [("wuerstchen", 0.01), ("shapes_wuerstchen", 0.1)])
def test_the_transformer_has_stage_cs_parameters(name, within):
    usual, other = (_parameters(_module(name).get_config(arg), "stage_c") for arg in ("", "transformer"))
    assert other == pytest.approx(usual, rel=within)


def test_the_public_sizes_are_the_published():
    config, count = _module("wuerstchen").get_config("published"), {}
    for stage in ("stage_b", "stage_c"):
        config.unlock()
        config[stage].model.update({"remat": False})
        # A tower of 0.35 B is frozen: the stage's own parameters need only its width.
        task = tasks.build(config[stage])
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        count |= {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert count["stage_b"] == 1_055_365_280 and count["stage_c"] == 993_636_896
    # The backbone, a 1x1 convolution to 16 channels, and BatchNorm.
    assert count["compressor"] == 20_177_488 + 1280 * 16 + 2 * 16


def test_the_papers_phases_start_where_the_one_before_ended():
    config = _module("wuerstchen").get_config("paper")
    assert config.stages[0] == "stage_a" and "stage_c" not in config  # which the weight average makes
    found = {}
    for stage in config.stages[1:]:
        one = config[stage]
        pixels, seen, start = one.data.image_size, one.compressor.size, one.init[one.task]
        found[stage] = (one.num_steps, one.batch_size, pixels, seen, start, one.init.compressor)
    assert found == {
        "stage_b_512": (457_000, 512, 512, 384, "", ""),
        "stage_b": (300_000, 128, 1024, 768, "../stage_b_512", "../stage_b_512"),
        "stage_c_384": (500_000, 1536, 384, 384, "", "../stage_b"),
        "stage_c_768": (364_000, 1536, 768, 768, "../stage_c_384", "../stage_b"),
        "stage_c_aspects": (4_000, 768, 768, 768, "../stage_c_768", "../stage_b"),
        "stage_c_artworks": (50_000, 384, 768, 768, "../stage_c_aspects", "../stage_b"),
    }
    assert config.stage_b.init.vqgan == "../stage_a"
    assert config.stage_c_aspects.data.buckets == ((768, 1280), (1280, 768), (768, 768))
    assert {config[stage].form for stage in config.stages if "stage_c" in stage} == {"eps_ab"}


def test_stages_read_one_set_unless_told_otherwise():
    config = _module("wuerstchen").get_config("paper")
    config.data.path, config.stage_c_artworks.data.path = "all", "artworks"
    read = {stage: ConfigDict(config[stage].to_dict()).data.path for stage in config.stages}
    assert read.pop("stage_c_artworks") == "artworks" and set(read.values()) == {"all"} and len(read) == 6
    assert _module("shapes_wuerstchen").get_config("ldm").ldm.data.source == "shapes"


def test_variants_are_applied_in_one_order():
    module = _module("wuerstchen")
    one, other = (module.get_config(arg) for arg in ("paper,transformer,runlocal", "runlocal,transformer,paper"))
    assert one == other and one.stage_c_artworks.model.network == "transformer" and one.stage_b.num_steps == 8
    baseline = module.get_config("text_only,paper")
    assert baseline.stages == ("stage_a", "stage_b_512", "stage_b")


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_name_keys_that_exist(name):
    sweeps = _module(name).get_sweep()
    assert sweeps
    for overrides in (overrides for sweep in sweeps.values() for overrides in sweep):
        overrides = dict(overrides)
        config = _module(name).get_config(overrides.pop("variant", ""))
        known = dict(_leaves(config))
        assert set(overrides) <= set(known)
        config.update_from_flattened_dict(overrides)  # refuses values of another type
        assert dict(_leaves(config)) == known | overrides


@pytest.mark.parametrize("name", NAMES)
def test_no_two_points_of_a_sweep_are_one_run(name):
    for points in _module(name).get_sweep().values():
        runs = []
        for overrides in map(dict, points):
            config = _module(name).get_config(overrides.pop("variant", ""))
            config.update_from_flattened_dict(overrides)
            runs.append(config.to_json())
        assert len(set(runs)) == len(runs)


def _mflop(config):
    """Of one image and training step, by XLA's count."""
    task, count = tasks.build(config), 16
    params, batch = jax.eval_shape(lambda: (task.init(jax.random.key(0))[0], _batch(count, config.data)))
    loss = lambda params, batch: task.loss(params, {}, batch, jax.random.key(0), jnp.int32(3))[0]  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params, batch).cost_analysis()["flops"] / count / 1e6


def _batch(count, data):
    images = jnp.zeros((count, data.image_size, data.image_size, data.channels), jnp.uint8)
    return {"image": images, "label": jnp.zeros(count, jnp.int32), "row": jnp.arange(count)}


@functools.cache
def _global_mflop(images="digits"):
    return _mflop(_module("studies.generators").get_config(images))


@pytest.mark.parametrize("arm", ["local", "patches", "pixels", "dit", "uvit"])
@pytest.mark.parametrize(("images", "margin"), [("digits", 0.06), pytest.param("faces", 0.1, marks=pytest.mark.slow)])
def test_the_rivals_of_a_study_cost_the_same(arm, images, margin):
    config = _module("studies.generators").get_config(f"{images},{arm}")
    assert _mflop(config) == pytest.approx(_global_mflop(images), rel=margin)


def test_what_a_study_changes_is_relative_to_its_images():
    digits, faces = (_module("studies.functions").get_config(f"{name}half_nyquist") for name in ("", "faces,"))
    assert (digits.model.cutoff, faces.model.cutoff) == ("2", "4")
    assert _module("studies.functions").get_config("faces").model.cutoff == "nyquist"


def test_every_set_of_images_is_named_before_a_studys_arm():
    dit = {name: _module("studies.generators").get_config(f"{name},dit") for name in ("digits", "faces", "cifar10")}
    found = {name: (config.data.source, config.data.image_size, config.num_steps) for name, config in dit.items()}
    assert found == {"digits": ("digits", 8, 1500), "faces": ("folder", 16, 600), "cifar10": ("npz", 16, 600)}
    assert {config.model.network for config in dit.values()} == {"dit"}


def test_longer_training_costs_what_pretraining_does():
    usual, pretrained, longer = (_module("studies.pretraining").get_config(arm) for arm in ("", "pretrained", "longer"))
    phase = phases.pretrain_config(pretrained)
    more = (longer.num_steps - usual.num_steps) * longer.batch_size * _global_mflop()
    assert more == pytest.approx(phase.num_steps * phase.batch_size * _mflop(phase), rel=0.01)


def test_every_batch_size_sees_the_same_images():
    for point in _module("studies.batches").get_sweep()["batch"]:
        assert point["batch_size"] * point["num_steps"] == pytest.approx(96_000, rel=0.02)
        assert point["batch_size"] // point["accumulate"] <= 128


@pytest.mark.parametrize(("name", "arg"), [case for case in CASES if "runlocal" in case[1]])
def test_tasks_are_built_from_what_a_work_directory_holds(name, arg):
    config = _module(name).get_config(arg)
    stored = ConfigDict(json.loads(config.to_json()))
    for task_name in ("consistency", "reconstruction")[: 1 + (config.model.network == "function")]:
        stored.task = task_name
        task = tasks.build(stored)
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        assert set(params) == set(task.trained)
        assert sum(x.size for x in jax.tree.leaves(params)) < 3_000_000  # a minute on 2 cores


@pytest.mark.parametrize("name", NAMES)
def test_full_sizes_are_built(name):
    task = tasks.build(_module(name).get_config(""))
    assert jax.eval_shape(task.init, jax.random.key(0))[0]["generator"]


def test_the_paper_is_the_papers():
    config = _module("celeba64_cm_func").get_config("paper")
    assert (config.batch_size, config.num_steps) == (32, 900_000)
    assert config.pretrain.num_steps == 30 * 202_599 // 32  # 30 epochs
    assert (config.preconditioning, config.distance, config.objective.name) == ("edm", "lpips", "ct")
    assert (config.model.function, config.model.cutoff) == ("5x256", "1024")
    optimizer = config.optimizers.generator
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.grad_clip) == (
        "radam",
        4e-4,
        0,
        0,
    )


@pytest.mark.parametrize("name", ["cifar10_cm_func", "celeba64_cm_func", "celeba128_cm_func"])
def test_the_paper_without_lpips_weights_names_the_file(name, tmp_path, monkeypatch):
    config = _module(name).get_config("paper,runlocal")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match="vgg16-397923af.pth"):
        tasks.build(config).frozen()
