import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen import ImageFunctionPipeline, RenderableFunctions
from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.models import rendering
from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.pipelines import image_functions
from fid_imagegen.training.runs import write_config


def make_config(**changes):
    config = common.runlocal(common.base())
    config.data.update({"source": "digits", "image_size": 8, "channels": 1})
    config.model.update({"patch": 4, "width": 16, "num_classes": 3, "weight_update": "scale"})
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(scope="module")
def pipe():
    """A generator of three classes whose every parameter is random, the gates too."""
    pipe = ImageFunctionPipeline(make_config(), None)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: pipe.task.init(jax.random.key(0))[0])
    pipe.params = jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape), jnp.float32), shapes)
    return pipe


@pytest.fixture(scope="module")
def functions(pipe):
    """Two-step samples: the noisy image counts."""
    return pipe.generate(3, seed=1, steps=2)


def same(a, b, atol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def test_function_i_depends_on_the_seed_and_i(pipe, functions, monkeypatch):
    monkeypatch.setattr(image_functions, "BATCH", 3)  # the shape that is compiled already
    five = pipe.generate(5, seed=1, steps=2)  # no multiple of the batch
    assert len(five) == 5
    same(five[:3].functions, functions.functions)
    assert np.abs(five[3:].functions.native.noisy - functions[:2].functions.native.noisy).max() > 0.1
    assert np.abs(pipe.generate(3, seed=2, steps=2).render(8, 8) - functions.render(8, 8).astype(int)).max() > 10


def test_labels_follow_their_images_through_batches(pipe, functions, monkeypatch):
    monkeypatch.setattr(image_functions, "BATCH", 3)
    turn, other = (pipe.generate(5, seed=1, steps=2, labels=[0, 1, 2, *more]) for more in ((0, 1), (2, 2)))
    same(turn[:3].functions, functions.functions)  # all classes in turn, as without labels
    same(other[:3].functions, functions.functions)
    same(turn.functions, pipe.generate(5, seed=1, steps=2).functions)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(axis=(1, 2)), turn.functions.per_image, other.functions.per_image
    )
    assert (np.max(jax.tree.leaves(moved), axis=0)[3:] > 1e-3).all()


def test_an_edit_follows_what_is_asked(pipe):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    asked = {"factor": 4, "steps": 2, "seed": 1, "labels": [0, 1]}
    at = lambda **changes: rendering.render(pipe.edit(images, "super_resolve", **asked | changes).functions, 8, 8)  # noqa: E731
    first = at()
    np.testing.assert_array_equal(at(), first)
    for changes in ({"factor": 2}, {"steps": 3}, {"seed": 2}):
        assert (np.abs(at(**changes) - first).max(axis=(1, 2, 3)) > 1e-3).all()
    other = np.abs(at(labels=[2, 1]) - first).max(axis=(1, 2, 3))
    assert other[0] > 1e-3 and other[1] < 1e-4


def test_renders_are_bytes_of_any_size(functions):
    images = functions.render(height=5, width=9)
    assert (images.shape, images.dtype) == ((3, 5, 9, 1), np.uint8)
    tile = functions.render(height=16, width=16, window=(0.25, 0.25, 0.5, 0.5))
    np.testing.assert_array_equal(tile, functions.render(64, 64)[:, 16:32, 16:32])
    np.testing.assert_array_equal(functions[1:].render(5, 9), images[1:])
    assert functions.nbytes == sum(x.nbytes for x in jax.tree.leaves(functions.functions))
    with pytest.raises(TypeError, match="found index 0, expected a slice"):
        list(functions)


def test_saved_functions_render_bit_for_bit(functions, tmp_path):
    functions.save(tmp_path / "f.safetensors")
    loaded = RenderableFunctions.load(tmp_path / "f.safetensors")
    assert loaded.functions.kind == functions.functions.kind and loaded.functions.grid == (8, 8)
    for size in ((8, 8), (3, 40)):
        np.testing.assert_array_equal(loaded.render(*size), functions.render(*size))
    bare = RenderableFunctions(functions.functions.replace(native=None))
    bare.save(tmp_path / "bare.safetensors")
    np.testing.assert_array_equal(
        RenderableFunctions.load(tmp_path / "bare.safetensors").render(9, 9), bare.render(9, 9)
    )


@pytest.mark.parametrize(
    "changes", [{"model.network": "dit", "model.heads": 2, "model.depth": 1}, {"model.function": "patch32"}], ids=str
)
def test_other_kinds_of_functions_are_saved_too(changes, tmp_path):
    """Pixels, which share nothing, and functions of patches."""
    unset = {f"model.{name}": None for name in ("function_width", "function_depth", "bands", "groups")}
    other = ImageFunctionPipeline(make_config(**unset, **changes), None)
    other.params = jax.jit(other.task.init)(jax.random.key(0))[0]
    made = other.generate(2, steps=2)
    made.save(tmp_path / "f.safetensors")
    again = RenderableFunctions.load(tmp_path / "f.safetensors")
    assert again.functions.kind == made.functions.kind
    np.testing.assert_array_equal(again.render(12, 17), made.render(12, 17))


def test_every_field_of_a_function_is_saved(functions, tmp_path):
    unusual = {"activation": "sine", "cutoff": 1 / 3, "omega": 0.1, "weight_update": "normalize", "dtype": "bfloat16"}
    kind = CoordinateMLP(channels=1, **unusual)
    RenderableFunctions(functions.functions.replace(kind=kind)).save(tmp_path / "f.safetensors")
    assert RenderableFunctions.load(tmp_path / "f.safetensors").functions.kind == kind


def test_other_files_are_no_functions(tmp_path):
    save_tree(tmp_path / "w.safetensors", {"kernel": np.zeros(3)}, {"format": "fid_imagegen.params.1"})
    with pytest.raises(
        ValueError, match="found format 'fid_imagegen.params.1'.*expected a file of RenderableFunctions"
    ):
        RenderableFunctions.load(tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:20])
    with pytest.raises(ValueError, match="cut.safetensors.*unreadable"):
        RenderableFunctions.load(tmp_path / "cut.safetensors")


def test_from_an_exported_folder(pipe, functions, tmp_path):
    write_config(tmp_path, pipe.config)
    save_tree(tmp_path / "model.safetensors", pipe.params, {})
    loaded = ImageFunctionPipeline.from_pretrained(tmp_path)
    same(loaded.generate(3, seed=1, steps=2).functions, functions.functions, atol=1e-6)


def test_folders_that_are_no_runs(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="found no .*nowhere.*expected a work directory or an exported folder"):
        ImageFunctionPipeline.from_pretrained(tmp_path / "nowhere")
    write_config(tmp_path, pipe.config)
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        ImageFunctionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, 1], r"int64 of shape \(2,\)"),
        (1, r"int64 of shape \(\)"),
        ([0, 1, 3], "from 0 to 3"),
        ([0, 1, -1], "from -1 to 1"),
        ([0, 1, 2**32], "from 0 to 4294967296"),  # 0 in 32 bits
        ([0.0, 1.0, 1.5], r"float64 of shape \(3,\)"),
        ([True, False, True], r"bool of shape \(3,\)"),
    ],
)
def test_labels_that_cannot_be(pipe, labels, found):
    with pytest.raises(ValueError, match=f"found labels {found}, expected 3 integers from 0 to 2"):
        pipe.generate(3, labels=labels)


@pytest.mark.parametrize("num", [0, -1, 10**9])
def test_numbers_that_cannot_be(pipe, num):
    with pytest.raises(ValueError, match=f"found num={num}, expected 1 to 1,000,000"):
        pipe.generate(num)


def test_generators_that_cannot():
    pipe = ImageFunctionPipeline(make_config(task="reconstruction"), {})
    with pytest.raises(ValueError, match="found a reconstruction run"):
        pipe.generate(1)
    with pytest.raises(ValueError, match="found a run of task 'reconstruction', expected a generator"):
        pipe.edit(np.zeros((1, 8, 8, 1), np.uint8), "super_resolve", factor=2)
    pipe = ImageFunctionPipeline(make_config(**{"model.num_classes": 0}), {"generator": {}})
    for labels in ([0], [0, 1]):
        with pytest.raises(ValueError, match="found labels for a model without classes"):
            pipe.generate(1, labels=labels)
    with pytest.raises(ValueError, match="found 0 sampling steps"):
        pipe.generate(1, steps=0)


def test_a_run_of_another_kind_is_named(random_stages):
    with pytest.raises(ValueError, match="found a run of task 'stage_c' in .*expected a generator of image functions"):
        ImageFunctionPipeline.from_pretrained(random_stages / "stage_c")
