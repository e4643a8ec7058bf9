"""Fréchet distances of samples: n samples and n training images, each against the same n held-out images."""

import numpy as np

from fid_imagegen.data import pipeline, sources
from fid_imagegen.evaluation.distances import frechet_distance, gaussian_statistics
from fid_imagegen.evaluation.features import Extract
from fid_imagegen.pipelines import ImageFunctionPipeline


def native_samples(pipe: ImageFunctionPipeline, num: int, *, seed: int = 0, steps: int | None = None) -> np.ndarray:
    """uint8 samples on the training grid [num, height, width, channels]."""
    size = pipe.config.data.image_size
    return pipe.generate(num, seed=seed, steps=steps).render(size, size)


def frechet_report(
    pipe: ImageFunctionPipeline, extract: Extract, *, num: int, seed: int = 0, steps: int | None = None
) -> dict:
    """{"num", "samples", "training"}: distances of `num` samples and of `num` training images to the same held-out images.

    The second is what real images score at this number: the distance is biased upwards for few images. `num` beyond the
    number of held-out images is a ValueError. Real images are taken evenly from the source's order, which in a folder of
    classes goes class by class.
    """
    data = pipe.config.data
    held_out = sources.make_source(data, held_out=True)
    if not 2 <= num <= len(held_out):
        raise ValueError(f"found num={num}, expected 2 to {len(held_out)}, the held-out images of {held_out.name}")

    def statistics(images):
        return gaussian_statistics(extract(images))

    def real_images(source):
        count = min(num, len(source))
        return pipeline.examples(source, data, np.arange(count) * len(source) // count)

    reference = statistics(real_images(held_out))
    made = statistics(native_samples(pipe, num, seed=seed, steps=steps))
    real = statistics(real_images(sources.make_source(data)))
    return {
        "num": num,
        "samples": frechet_distance(made, reference),
        "training": frechet_distance(real, reference),
    }
