import jax.numpy as jnp
import numpy as np

from fid_imagegen.models.rotary import rotary_angles, rotate

ROWS, COLUMNS = 4, 6
ANGLES = rotary_angles(ROWS, COLUMNS, 8)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_rotation_is_a_product_of_complex_numbers():
    """Of pair k and k + 4 with e^(i angle): row, row / 100, column, column / 100 are the angles of heads of 8."""
    x = draw(2, ROWS * COLUMNS, 3, 8)
    expected = np.empty_like(x)
    for row in range(ROWS):
        for column in range(COLUMNS):
            token = row * COLUMNS + column
            angles = np.array([row, row / 100, column, column / 100])
            turned = (x[:, token, :, :4] + 1j * x[:, token, :, 4:]) * np.exp(1j * angles)
            expected[:, token] = np.concatenate([turned.real, turned.imag], axis=-1)
    found = rotate(jnp.asarray(x), ANGLES)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    half = rotate(jnp.asarray(x, jnp.bfloat16), ANGLES)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=4e-2)


def test_products_of_one_query_and_key_depend_on_the_distance_alone():
    query, key = (jnp.tile(draw(1, 1, 1, 8, seed=seed), (1, ROWS * COLUMNS, 1, 1)) for seed in (1, 2))
    q, k = (np.asarray(rotate(x, ANGLES))[0, :, 0].reshape(ROWS, COLUMNS, 8) for x in (query, key))
    products = {}
    for y, x, v, u in np.ndindex(ROWS, COLUMNS, ROWS, COLUMNS):
        products.setdefault((v - y, u - x), []).append(q[y, x] @ k[v, u])
    assert len(products) == (2 * ROWS - 1) * (2 * COLUMNS - 1)
    assert max(np.ptp(values) for values in products.values()) < 1e-5
    values = np.sort([values[0] for values in products.values()])
    assert np.diff(values).min() > 1e-6 and np.ptp(values) > 1  # and on nothing less than the distance
