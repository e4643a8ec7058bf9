import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.dit import DITS, PUBLIC_DIT, DiT, column_row_positions
from fid_imagegen.models.layers import BlockStyle, patchify, unpatchify

MODEL = DiT(channels=3, patch=2, width=16, heads=2, depth=2, num_classes=3, style=BlockStyle(qk_norm=True))
LEVELS = jnp.asarray([[-1.0], [0.7]])
LABELS = jnp.asarray([2, 0])


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(MODEL.init)(jax.random.key(0), images, LEVELS, LABELS)["params"]


@pytest.fixture(scope="module")
def trained(params):
    """Every parameter moved, those that start at zero too."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * generator.standard_normal(x.shape), jnp.float32), params)


@jax.jit
def call(params, x, levels=LEVELS, labels=LABELS):
    return MODEL.apply({"params": params}, x, levels, labels)


def count(model, size=16):
    image, one = jnp.zeros((1, size, size, model.channels)), jnp.zeros(1, jnp.int32)
    return sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image, jnp.zeros((1, 1)), one))
    )


@pytest.mark.parametrize(
    ("preset", "patch", "parameters"),
    [
        ("S", 2, 32_471_436),
        ("S", 4, 32_499_120),
        ("B", 2, 129_528_588),
        ("B", 4, 129_583_920),
        ("L", 2, 456_791_052),
        ("XL", 2, 673_653_900),
    ],
)
def test_parameters_of_the_presets_in_pixels(preset, patch, parameters):
    assert count(DiT(channels=3, patch=patch, **DITS[preset])) == parameters


def test_the_public_model_has_its_published_size():
    # The authors count the fixed positions of 256 patches too.
    assert count(DiT(**PUBLIC_DIT)) + 256 * 1152 == 675_129_632


def test_an_untrained_model_returns_zeros(params, trained, images):
    assert not call(params, images).any()
    assert call(trained, images).shape == images.shape and np.abs(call(trained, images)).min() > 0


def test_columns_come_first_in_positions():
    found = column_row_positions(2, 3, 8).reshape(2, 3, 8)
    encode = lambda p: [np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)]  # noqa: E731
    np.testing.assert_allclose(found[1, 2], [*encode(2), *encode(1)], rtol=1e-6)


def test_patches_hold_their_pixels_by_row_column_channel(images):
    patches = patchify(np.asarray(images), 2)
    np.testing.assert_array_equal(patches[:, 3 + 2], images[:, 2:4, 4:6].reshape(2, 12))
    np.testing.assert_array_equal(unpatchify(patches, 2, rows=2), images)


def test_patches_go_back_where_they_came_from(trained):
    """With closed gates a pixel of the output depends on its own patch alone."""
    closed = jax.tree.map(jnp.zeros_like, trained["extractor"]["blocks"]["modulation"])
    blocks = trained["extractor"]["blocks"] | {"modulation": closed}
    params = trained | {"extractor": trained["extractor"] | {"blocks": blocks}}
    x = jnp.zeros((2, 4, 6, 3))
    moved = np.abs(call(params, x.at[:, 1, 5].add(1.0)) - call(params, x)).max(axis=(0, 3)) > 1e-6
    expected = np.zeros((4, 6), bool)
    expected[:2, 4:] = True
    np.testing.assert_array_equal(moved, expected)


def test_scan_unrolled_and_rematerialised_are_equal(trained, images):
    """In values and gradients, on one tree of parameters."""

    def run(**flags):
        model = MODEL.clone(**flags)
        loss = lambda p: (y := model.apply({"params": p}, images, LEVELS, LABELS), jnp.sum(y**2))[::-1]  # noqa: E731
        text = str(jax.make_jaxpr(lambda p: loss(p)[0])(trained))
        assert ("unroll=2" in text, "prevent_cse" in text) == (bool(flags), bool(flags))
        return jax.jit(jax.grad(loss, has_aux=True))(trained)

    for found, expected in zip(jax.tree.leaves(run(unroll=True, remat=True)), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_blocks_are_stacked(params):
    blocks = params["extractor"]["blocks"]
    assert {x.shape[0] for x in jax.tree.leaves(blocks)} == {2}
    assert not np.allclose(*blocks["attention"]["query"]["kernel"])  # each drawn by itself


def test_normed_queries_and_keys_have_no_scale(trained, images):
    """Ten times the keys' weights leave the output alone, unless they are not normed."""
    attention = trained["extractor"]["blocks"]["attention"]

    def ten_times(params, normed):
        louder = attention | {"key": jax.tree.map(lambda x: 10 * x, attention["key"])}
        if not normed:
            louder = {name: x for name, x in louder.items() if not name.endswith("_norm")}
        return params | {
            "extractor": params["extractor"] | {"blocks": params["extractor"]["blocks"] | {"attention": louder}}
        }

    normal = call(trained, images)
    np.testing.assert_allclose(call(ten_times(trained, True), images), normal, atol=1e-3)
    unnormed = MODEL.clone(style=BlockStyle()).apply({"params": ten_times(trained, False)}, images, LEVELS, LABELS)
    assert np.abs(unnormed - normal).max() > 0.1
    assert {attention[name]["scale"].shape for name in ("query_norm", "key_norm")} == {(2, 8)}


@pytest.mark.parametrize(
    ("changes", "shape", "labels", "message"),
    [
        ({}, (1, 4, 5, 3), True, "found images of 4x5, expected multiples of the patch, 2; resize them or"),
        ({}, (1, 4, 4, 1), True, "found images of 1 channels, expected 3; change"),
        ({}, (1, 4, 4, 3), False, r"found no labels, expected one of 0\.\.3 an image; give label_B"),
        ({"heads": 3}, (1, 4, 4, 3), True, "found width 16 with 3 heads, expected a multiple; change"),
        ({"width": 18}, (1, 4, 4, 3), True, "found 18 features, expected a multiple of 4"),
    ],
)
def test_what_does_not_fit(changes, shape, labels, message):
    labels = jnp.zeros(1, jnp.int32) if labels else None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODEL.clone(**changes).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros((1, 1)), labels)


def test_more_channels_out_than_in(images):
    model = MODEL.clone(out_channels=6, num_classes=0)
    shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), images, LEVELS)
    assert shapes[0].shape == (2, 4, 6, 6) and "label" not in shapes[1]["params"]["extractor"]
