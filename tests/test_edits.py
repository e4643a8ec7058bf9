"""Zero-shot edits through the pipeline: what is known stays, the rest is the generator's, the result is a function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fid_imagegen import ImageFunctionPipeline
from fid_imagegen.models.rendering import render
from fid_imagegen.pipelines.edits import projection
from fid_imagegen.tasks.generator import to_float

PIXELS = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
MASK = np.tile([1, 0], (8, 4))


@pytest.fixture(scope="module")
def pipe():
    """A generator in colour whose every parameter is random."""
    config = common.runlocal(common.base())
    config.data.update({"source": "synthetic", "image_size": 8, "channels": 3})
    config.model.update({"patch": 4, "width": 16, "weight_update": "scale"})
    pipe = ImageFunctionPipeline(config.lock(), None)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: pipe.task.init(jax.random.key(0))[0])
    pipe.params = jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape), jnp.float32), shapes)
    return pipe


@pytest.mark.parametrize(
    ("edit", "settings"),
    [("inpaint", {"mask": MASK}), ("colourise", {}), ("super_resolve", {"factor": 4})],
)
def test_edits_keep_what_is_known_and_nothing_else(pipe, edit, settings):
    known = projection(edit, settings.get("mask"), settings.get("factor"))
    edited = pipe.edit(PIXELS, edit, steps=3, **settings)
    values = render(edited.functions, 8, 8)
    np.testing.assert_allclose(known(values), known(to_float(PIXELS)), atol=2e-5)
    assert np.abs(values - to_float(PIXELS)).max() > 0.1
    # What is not known is not looked at, and the result is a function.
    hidden = PIXELS.copy()
    if edit == "inpaint":
        hidden[:, MASK == 0] = 255 - hidden[:, MASK == 0]
        np.testing.assert_allclose(
            render(pipe.edit(hidden, edit, steps=3, **settings).functions, 8, 8), values, atol=1e-5
        )
    assert edited.render(20, 31).shape == (2, 20, 31, 3)
    assert edited.functions.native.out.min() > 0.5  # at the training size f is the function and not the noisy pixels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": PIXELS[:, :4]}, r"found images uint8 \(2, 4, 8, 3\), expected uint8 \[batch, 8, 8, 3\]"),
        ({"images": PIXELS[:0]}, r"found images uint8 \(0, 8, 8, 3\)"),
        ({"images": [[0.5]]}, r"found images float64 \(1, 1\)"),
        ({"edit": "sharpen"}, "found edit 'sharpen', expected one of .*'inpaint'"),
        ({"mask": None}, "found neither mask nor factor for 'inpaint', expected a mask"),
        ({"factor": 2}, "found a mask and a factor for 'inpaint', expected a mask"),
        ({"mask": MASK * 2}, r"from 0 to 2, expected 0 and 1 in \[8, 8\]"),
        ({"mask": MASK[:0]}, r"found a mask of shape \(0, 8\), expected 0 and 1 in \[8, 8\]"),
        (
            {"edit": "super_resolve", "mask": None, "factor": 3},
            "found factor 3, expected an integer, a divisor of the training size 8",
        ),
        ({"edit": "super_resolve", "mask": None, "factor": 0}, "found factor 0, expected an integer"),
        ({"edit": "super_resolve", "mask": None, "factor": 4.0}, "found factor 4.0, expected an integer"),
    ],
)
def test_edits_that_cannot_be(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        pipe.edit(**{"images": PIXELS, "edit": "inpaint", "mask": MASK} | changes)


def test_an_edit_has_the_size_of_the_generators_grid_and_is_compiled_once(pipe):
    """Where the noise has a grid of its own, that is what the network sees."""
    config = pipe.config.copy_and_resolve_references()
    config.unlock()
    config.update({"grid": 8, "window": 4, "variational": False})
    config.data.image_size = 16
    large = ImageFunctionPipeline(config.lock(), pipe.params)
    for seed in (0, 1):
        made = large.edit(PIXELS, "super_resolve", factor=4, steps=2, seed=seed)
    assert made.render(16, 16).shape == (2, 16, 16, 3) and large._edit._cache_size() == 1
    with pytest.raises(ValueError, match=r"expected uint8 \[batch, 8, 8, 3\]"):
        large.edit(np.zeros((2, 16, 16, 3), np.uint8), "colourise")
