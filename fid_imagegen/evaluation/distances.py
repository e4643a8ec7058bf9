"""Distances between sets of features and between images, in float64 on the host."""

import warnings

import numpy as np
from einops import reduce
from jaxtyping import Float

Statistics = tuple[Float[np.ndarray, "features"], Float[np.ndarray, "features features"]]


def gaussian_statistics(features_ND: Float[np.ndarray, "samples features"]) -> Statistics:
    """Mean [D] and unbiased covariance [D, D] of N >= 2 finite feature vectors; warns of its rank where N <= D."""
    features_ND = np.asarray(features_ND, np.float64)
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise ValueError(f"found features {features_ND.shape}, expected [N >= 2, D]; give more samples, flattened")
    if not np.isfinite(features_ND).all():
        bad = np.flatnonzero(~np.isfinite(features_ND).all(axis=1))
        raise ValueError(
            f"found NaN or inf in {len(bad)} samples, first {bad[0]}, expected finite features; check the model"
        )
    samples, dimensions = features_ND.shape
    if samples <= dimensions:
        warnings.warn(
            f"found {samples} samples in {dimensions} dimensions: the covariance has rank {samples - 1} at most and "
            f"distances are biased upwards; give more than {dimensions} samples",
            stacklevel=2,
        )
    return features_ND.mean(axis=0), np.atleast_2d(np.cov(features_ND, rowvar=False))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)), in squared units of the features. The trace of the
    root is a sum of root eigenvalues of a symmetric matrix: singular covariances need no epsilon and no complex numbers.
    """
    (mean_a, cov_a), (mean_b, cov_b) = [tuple(np.asarray(part, np.float64) for part in stats) for stats in (a, b)]
    dimensions = mean_a.size
    for mean, cov in ((mean_a, cov_a), (mean_b, cov_b)):
        if mean.shape != (dimensions,) or cov.shape != (dimensions, dimensions):
            raise ValueError(
                f"found mean {mean.shape} and covariance {cov.shape} beside {dimensions} dimensions, expected [D] and "
                "[D, D] alike on both sides; take both statistics with the same features"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("found NaN or inf in the statistics, expected finite values; take them anew")
    values, vectors = np.linalg.eigh(cov_a)
    # A^(1/2) restricted to A's range: round-off outside it would enter as its square root, 1e-8 instead of 1e-16.
    kept = values > values.max() * dimensions * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = root.T @ cov_b @ root
    trace_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return max(float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root), 0.0)


def psnr(
    a: Float[np.ndarray, "batch height width channels"],
    b: Float[np.ndarray, "batch height width channels"],
    peak: float = 2.0,
) -> Float[np.ndarray, "batch"]:
    """Peak signal-to-noise ratio of each pair in dB, inf where equal; `peak` is 2 because images lie in [-1, 1]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"found shapes {a.shape} and {b.shape}, expected one [B, H, W, C]; pair the images first")
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / reduce(np.square(a - b), "b h w c -> b", "mean"))
