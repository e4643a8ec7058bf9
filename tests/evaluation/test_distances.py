import numpy as np
import pytest

from fid_imagegen.evaluation.distances import frechet_distance, gaussian_statistics, psnr


def random_statistics(rng, dimensions):
    return gaussian_statistics(
        rng.normal(size=(4 * dimensions, dimensions)) @ rng.normal(size=(dimensions, dimensions))
    )


def test_statistics_are_numpy_s():
    features = np.random.default_rng(0).normal(size=(20, 3))
    mean, covariance = gaussian_statistics(features.astype(np.float32))
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-5)  # N - 1, not N
    assert gaussian_statistics(features[:, :1])[1].shape == (1, 1)


def test_agrees_with_the_matrix_square_root_at_full_rank():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = random_statistics(rng, 24), random_statistics(rng, 24)
    expected = np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1] - 2 * linalg.sqrtm(a[1] @ b[1]).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rank", [8, 5])  # 5: three directions without variance in a, others in b
def test_closed_form_of_commuting_covariances(rank):
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    variances_a, variances_b = rng.uniform(1, 5, (2, 8))
    variances_a[rank:] = 0
    variances_b[: 8 - rank] = 0
    mean_a, mean_b = rng.normal(size=(2, 8))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2)
    for rotation in (np.eye(8), basis):
        a, b = ((m, rotation * v @ rotation.T) for m, v in ((mean_a, variances_a), (mean_b, variances_b)))
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_zero_for_equal_sets_and_symmetric():
    rng = np.random.default_rng(2)
    a, b = random_statistics(rng, 16), random_statistics(rng, 16)
    assert frechet_distance(a, a) < 1e-10 * np.trace(a[1])
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    constant = (np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(constant, constant) == 0
    with pytest.warns(UserWarning, match="rank 9 at most"):
        singular = gaussian_statistics(rng.normal(size=(10, 16)))
    assert frechet_distance(singular, singular) < 1e-10 * np.trace(singular[1])
    assert frechet_distance(singular, a) == pytest.approx(frechet_distance(a, singular), rel=1e-6)


def test_what_cannot_be_measured_is_refused():
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="N >= 2"):
        gaussian_statistics(np.ones((1, 4)))
    with pytest.raises(ValueError, match="1 samples, first 2"):
        gaussian_statistics(np.array([[0.0], [1.0], [np.nan], [2.0]]))
    a, b = random_statistics(rng, 3), random_statistics(rng, 4)
    with pytest.raises(ValueError, match="same features"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(a, (a[0] * np.nan, a[1]))


def test_psnr_of_known_errors():
    images = np.zeros((3, 4, 4, 3))
    other = images + np.array([0.2, 2.0, 0.0])[:, None, None, None]
    np.testing.assert_allclose(psnr(images, other), [20.0, 0.0, np.inf], atol=1e-12)
    with pytest.raises(ValueError, match="pair the images"):
        psnr(images, other[:1])
