"""Stage C on cached features trains as it does on pictures and captions; features of anything else are refused."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import wuerstchen
from fid_imagegen import features, tasks
from fid_imagegen.data import features as data_features
from fid_imagegen.data.sources import make_source
from fid_imagegen.data.tokenizer import train_bpe
from fid_imagegen.interop.clip import save_clip
from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.models.text import clip
from fid_imagegen.parallel import mesh
from fid_imagegen.tasks.latent import unit
from fid_imagegen.training import runs
from fid_imagegen.training.features import Encoder
from fid_imagegen.training.loop import Run

RECORDS, BATCH, STEPS = 12, 8, 4
BUCKETS = ((32, 32), (32, 48))
CAPTIONS = [[f"picture {i}", f"a red thing, {i} by number"][: 1 + i % 2] for i in range(RECORDS)]


def stage(root, encoder, **changes):
    """Stage C's config with that text encoder: 32 px, two by two latents."""
    config = wuerstchen.get_config("runlocal").stage_c.copy_and_resolve_references().unlock()
    config.data.update({"source": "captions", "path": str(root / "set"), "flip": True, "image_size": 32})
    config.model.update({"depth": 1, "dropout": 0.0, "remat": False, "unroll": True})
    config.update({"batch_size": BATCH, "text_dropped": 0.3})
    config.compressor.size = 32
    if encoder == "tiny":
        config.text.update({"encoder": "tiny", "tokenizer": str(root / "tokenizer.json")})
        config.text.weights = str(root / "clip.safetensors")
        del config.optimizers.text, config.init.text
    config.update_from_flattened_dict(changes)
    return config.lock()


def write_stage_b(folder, config, seed):
    """What Stage C takes of Stage B: its compressor and the moments of its latents."""
    compressor = tasks.build(config).compressor
    made = jax.jit(lambda key: compressor.init(key, jnp.zeros((1, 32, 32, 3)), False))(jax.random.key(seed))
    stats = {"batch_stats": made["batch_stats"], "latents": {"mean": np.full(16, 0.1), "variance": np.full(16, 0.5)}}
    runs.write_config(folder, config)
    save_tree(folder / "model.safetensors", {"compressor": made["params"], "compressor_stats": stats}, {})


def write_set(folder):
    """Pictures of noise, wide and tall, each with one or two captions."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i, lines in enumerate(CAPTIONS):
        size = (32, 48) if i % 3 else (40, 32)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_device):
    """Stage B in run/, a captioned set, a CLIP tower `tiny` with its tokenizer, and the features small/, tiny/, bucketed/."""
    root = tmp_path_factory.mktemp("cached")
    write_set(root / "set")
    for seed, name in enumerate(("run", "other_run")):
        write_stage_b(root / name / "stage_b", stage(root, "small"), seed)
    for name, vocabulary in (("tokenizer", 300), ("other_tokenizer", 280)):
        tokenizer = train_bpe(itertools.chain(*CAPTIONS), vocabulary=vocabulary, length=77)
        (root / f"{name}.json").write_text(tokenizer.json())
    tower = {"width": 32, "layers": 1, "heads": 2, "hidden": 16, "activation": "gelu"}
    tower |= {"vocabulary": 300, "length": 77, "end": tokenizer.end}
    init = jax.jit(lambda key: clip.CLIPTextEncoder(**tower).init(key, jnp.zeros((1, 77), jnp.int32))["params"])
    for seed, name in enumerate(("clip", "other_clip")):
        save_clip(root / f"{name}.safetensors", init(jax.random.key(seed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.TOWERS, "tiny", tower)
        patch.setattr(data_features, "SHARD", 5)
        wanted = {"small": stage(root, "small"), "tiny": stage(root, "tiny")}
        wanted["bucketed"] = stage(root, "tiny", **{"data.buckets": BUCKETS})
        for name, config in wanted.items():
            assert features.make(config, root / "run" / "stage_c", root / name, batch_size=8) == RECORDS
        yield root


@pytest.fixture
def pair(root):
    """pair(encoder, folder) -> a run on pictures and captions, and one on the cached features of `folder`."""

    def make(encoder, folder, **changes):
        folders = ("", str(root / folder))
        return [Run(stage(root, encoder, **{"data.features": f} | changes), root / "run" / "stage_c") for f in folders]

    return make


def first(run, count):
    """The first batches of a run."""
    batches = run.batches(0)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def test_what_is_cached_is_what_training_makes_of_every_batch(pair):
    """In two buckets, with mirror images and several captions."""
    on_pictures, cached = pair("tiny", "bucketed", **{"data.buckets": BUCKETS})
    compress = jax.jit(lambda groups, images: on_pictures.task.compress(groups, unit(images)))
    encode = jax.jit(on_pictures.task.text.encode)
    shapes = set()
    for with_pictures, without in zip(first(on_pictures, 12), first(cached, 12), strict=True):
        assert set(without) == {"latents", "text"} and without["text"].dtype == jnp.bfloat16
        expected = compress(on_pictures.frozen, with_pictures["image"])
        np.testing.assert_allclose(without["latents"], expected, atol=1e-5)
        text = encode(on_pictures.frozen, with_pictures["tokens"], with_pictures["mask"])
        np.testing.assert_allclose(without["text"].astype(np.float32), text, rtol=2**-8, atol=1e-5)
        shapes.add(expected.shape[1:3])
    assert shapes == {(2, 2), (2, 3)}


def test_one_batch_is_read_ahead_and_no_more(toy):
    """Every picture is counted when it is read, every record when its features are taken."""
    config, read, ahead = toy(), [], []
    source = make_source(config.data)
    counted = type("Counted", (type(source),), {"__getitem__": lambda self, i: read.append(i) or source[i]})(
        config.data
    )
    task = SimpleNamespace(compress=lambda groups, images: images)
    made = {"config": config, "source": counted, "task": task, "frozen": {}, "batch_sharding": None}

    class Bar:
        n = 0

        def update(self, count=1):
            self.n += count
            ahead.append(len(read) - self.n)

    records = Encoder(SimpleNamespace(**made), Bar())(range(10 * config.batch_size + 1))
    assert len(records) == len(read) == 10 * config.batch_size + 1
    np.testing.assert_allclose(records[-1]["latents"][0], unit(source[len(read) - 1]["image"]), atol=1e-6)
    assert max(ahead) < 2 * config.batch_size


def random_params(run):
    """All drawn: heads and gates start at zero otherwise."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(lambda: run.task.init(jax.random.key(0))[0])
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)


def loss(run, params, batch, number):
    """Of the batch of that number."""
    rows = {"row": jnp.arange(BATCH)}
    return run.task.loss(params | run.frozen, {}, batch | rows, jax.random.key(number), 0)[0]


def descended(run, params):
    """(losses, parameters) of a few steps of plain gradient descent: Adam would blow up the rounding of tiny gradients."""
    step = jax.jit(jax.value_and_grad(functools.partial(loss, run)))
    losses = []
    for number, batch in enumerate(first(run, STEPS)):
        value, gradient = step(params, batch, number)
        params = jax.tree.map(lambda x, g: x - 0.1 * np.asarray(g), params, gradient)
        losses.append(float(value))
    return losses, params


def distance(a, b):
    return np.sqrt(sum(np.sum(np.square(x - y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def test_training_ends_with_the_same_parameters(pair):
    """But for the order of sums, which XLA chooses anew for each program."""
    on_pictures, cached = pair("small", "small")
    start = random_params(on_pictures)
    (losses, params), (other_losses, other) = descended(on_pictures, start), descended(cached, start)
    np.testing.assert_allclose(other_losses, losses, rtol=2e-4)
    assert distance(params, other) < 2e-4 * distance(params, start)


def test_cached_text_changes_losses_by_its_rounding_alone(pair):
    on_pictures, cached = pair("tiny", "tiny")
    params, losses = random_params(on_pictures), []
    for run in (on_pictures, cached):
        value = jax.jit(functools.partial(loss, run, params))
        losses.append([float(value(batch, number)) for number, batch in enumerate(first(run, STEPS))])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0] != losses[1]


def test_a_cached_text_encoder_stays_off_the_devices_and_is_still_checked(pair, root):
    on_pictures, cached = pair("tiny", "tiny")
    assert set(cached.frozen) == {"compressor", "compressor_stats", "empty_text"}
    assert cached.meta == on_pictures.meta and "text" in cached.meta["frozen"]
    # Previews are those of a run without the cache, of captions that need not be cached.
    examples, expected = cached.examples(), on_pictures.examples()
    assert "tokens" not in examples
    np.testing.assert_array_equal(examples["image"], expected["image"])
    made = jax.jit(on_pictures.task.text.encode)(on_pictures.frozen, expected["tokens"], expected["mask"])
    np.testing.assert_allclose(examples["text"], made, atol=1e-5)
    groups = cached.abstract.params | cached.frozen
    assert jax.eval_shape(cached.task.preview, groups, examples)["latents"].shape == (8, 2, 2, 3)
    # A work directory holds the tokenizer as it was loaded: its features stay its own.
    config = stage(root, "tiny", **{"data.features": str(root / "tiny")})
    again = Run(config, root / "run" / "again")
    again.write_config()
    assert len(list((root / "run" / "again" / "frozen").glob("text-*.safetensors"))) == 1
    assert Run(config, root / "run" / "again").features is not None


@pytest.mark.parametrize(
    ("encoder", "folder", "changes", "message"),
    [
        ("tiny", "small", {}, "text None there, {'encoder': 'tiny', 'dtype': 'float32'} here"),
        ("small", "tiny", {}, "text {'encoder': 'tiny', 'dtype': 'float32'} there, None here"),
        ("tiny", "tiny", {"data.image_size": 16, "compressor.size": 16}, "image_size 32 there, 16 here"),
        ("tiny", "tiny", {"data.buckets": BUCKETS}, r"buckets \[\] there, \[\[32, 32\], \[32, 48\]\] here"),
        ("tiny", "tiny", {"data.holdout_every": 3}, r"data '\w+' there, '\w+' here; records 12 there, 8 here"),
        ("tiny", "tiny", {"compressor.size": 64}, "compressor {.*'size': 32.* there, {.*'size': 64"),
        ("tiny", "tiny", {"text.dtype": "bfloat16"}, "'dtype': 'float32'.* there, .*'dtype': 'bfloat16'"),
        ("tiny", "tiny", {"text.weights": "other_clip.safetensors"}, r"\(text weights '\w+' there, '\w+' here\)"),
        ("tiny", "tiny", {"text.tokenizer": "other_tokenizer.json"}, r"\(tokenizer '\w+' there, '\w+' here\)"),
        ("small", "small", {"init.compressor": "other_run/stage_b"}, r"\(compressor weights '\w+' there, '\w+' here\)"),
    ],
)
def test_features_of_something_else_are_refused(root, monkeypatch, encoder, folder, changes, message):
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=f"found other features in .*{folder} than are wanted.*{message}"):
        Run(stage(root, encoder, **{"data.features": str(root / folder)} | changes), root / "run" / "stage_c")


def test_features_made_by_other_code_are_refused(root, monkeypatch):
    monkeypatch.setattr(data_features, "PREPROCESSING", 0)
    with pytest.raises(ValueError, match="preprocessing 1 there, 0 here"):
        Run(stage(root, "small", **{"data.features": str(root / "small")}), root / "run" / "stage_c")


def test_random_crops_are_not_cached(root):
    config = stage(root, "small", **{"data.resize": 32, "data.features": str(root / "small")})
    with pytest.raises(ValueError, match="found features with resize=32, expected 0"):
        Run(config, root / "run" / "stage_c")
    with pytest.raises(ValueError, match="found features with resize=32, expected 0"):
        features.make(config, root / "run" / "stage_c", root / "cropped", batch_size=8)


def test_a_task_that_needs_pictures_takes_no_features(toy, tmp_path):
    with pytest.raises(ValueError, match="found features for task 'toy', which needs the pictures"):
        Run(toy(**{"data.features": str(tmp_path)}), tmp_path)
