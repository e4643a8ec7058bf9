"""The statistics of a semantic compressor's latents: the space Stage C lives in."""

import jax
import numpy as np

from fid_imagegen.data import pipeline, sources
from fid_imagegen.tasks.latent import unit

MAX_IMAGES = 1024
BATCH = 64


def latent_report(stage) -> dict:
    """Per-channel mean and deviation over training images, the range, and how far outliers lie in deviations of their channel.

    `stage`: a pipeline's Stage B. "outliers": the share of values beyond 4 deviations (of a normal distribution: 6e-5).
    """
    data = stage.config.data
    source = sources.make_source(data)
    indices = np.arange(min(MAX_IMAGES, len(source)))
    compress = jax.jit(lambda groups, images: stage.task.compress(groups, unit(images)))
    parts = [
        compress(stage.groups, pipeline.examples(source, data, indices[i : i + BATCH]))
        for i in range(0, len(indices), BATCH)
    ]
    values = np.concatenate(parts).reshape(-1, stage.config.compressor.channels).astype(np.float64)
    mean, deviation = values.mean(0), values.std(0)
    distance = np.abs(values - mean) / np.maximum(deviation, 1e-12)
    return {
        "images": len(indices),
        "mean": np.round(mean, 3).tolist(),
        "deviation": np.round(deviation, 3).tolist(),
        "smallest": float(values.min()),
        "largest": float(values.max()),
        "outliers": float((distance > 4).mean()),
        "furthest_outlier_deviations": float(distance.max()),
    }
