import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.diffusion.guidance import guided, lerp
from fid_imagegen.diffusion.targets import FORMS


def draws(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_lerp_passes_through_both_and_beyond():
    unconditional, conditional = draws(2, 1, 3, 3, 2)
    np.testing.assert_array_equal(lerp(unconditional, conditional, 0.0), unconditional)
    np.testing.assert_allclose(lerp(unconditional, conditional, 1.0), conditional, atol=1e-6)
    expected = unconditional + 8 * (conditional - unconditional)
    np.testing.assert_allclose(lerp(unconditional, conditional, 8.0), expected, rtol=1e-6)


def test_one_doubled_batch_equals_two_evaluations():
    x, t_B, text_B = draws(3, 4, 4, 2), jnp.asarray([0.1, 0.5, 0.9]), draws(6)
    calls = []

    def bound(text_B):
        def predict(x, t_B):
            calls.append(x.shape[0])
            return jnp.sin(x * text_B[:, None, None, None] + t_B[:, None, None, None])

        return predict

    both = guided(bound(text_B), 4.0)(x, t_B)
    assert calls == [6]
    expected = lerp(bound(text_B[3:])(x, t_B), bound(text_B[:3])(x, t_B), 4.0)
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_guiding_a_prediction_guides_the_denoised_image_and_the_noise(name):
    """What the docstring of `guided` rests on: with any form, predictions mix as x0 and eps do."""
    law, t_B = FORMS[name], jnp.asarray([0.3, 0.7])
    x, unconditional, conditional = draws(3, 2, 4, 4, 2)
    mixed = lerp(unconditional, conditional, 3.0)
    for convert in (law.to_x0, law.to_eps):
        expected = lerp(convert(unconditional, x, t_B), convert(conditional, x, t_B), 3.0)
        np.testing.assert_allclose(convert(mixed, x, t_B), expected, rtol=1e-4, atol=1e-4)
