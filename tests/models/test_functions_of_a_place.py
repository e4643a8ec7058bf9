"""What image functions made of patches have in common: no seam between patches, and windows that are crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.image_function import ImageFunctions, evaluate
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.patch_function import PatchMLP
from fid_imagegen.models.pixel_function import PixelMLP
from fid_imagegen.models.rendering import render

KINDS = [
    LocalMLP(channels=3, rows=2, columns=3, features=5, width=7, depth=3, bands=2),
    PatchMLP(channels=3, rows=2, columns=3, width=5, bands=4),
    PixelMLP(channels=3, rows=2, columns=3, patch=4, values=5, width=7),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: type(kind).__name__)
def functions(request):
    """Random functions on a grid of 8x12 pixels."""
    kind, generator = request.param, np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    shared = jax.tree.map(lambda x: draw(*x.shape), kind.init_shared(jax.random.key(0)))
    per_image = {"features": draw(2, 2, 3, kind.features)}
    return ImageFunctions(kind=kind, grid=(8, 12), shared=shared, per_image=per_image)


@pytest.mark.parametrize("across", [0, 1])
def test_there_is_no_seam(functions, across):
    """Halving the distance of points halves the largest step between them; a jump would stay."""

    def largest_step(count):
        line = np.linspace(-0.99, 0.99, count)
        coords = np.full((count, 2), 0.1)
        coords[:, across] = line
        values = np.asarray(jax.jit(evaluate)(functions, np.float32(coords), np.float32([1e-3, 1e-3])))
        return np.abs(np.diff(values, axis=1)).max()

    assert 0 < largest_step(4001) < 0.6 * largest_step(2001)


def test_a_window_is_the_crop(functions):
    whole = render(functions, 24, 36)
    np.testing.assert_array_equal(render(functions, 12, 18, window=(0.25, 0.25, 0.75, 0.75)), whole[:, 6:18, 9:27])
