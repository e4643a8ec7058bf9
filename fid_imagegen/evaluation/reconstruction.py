"""Held-out PSNR of the function predictor."""

from fid_imagegen.data import pipeline, sources
from fid_imagegen.tasks.reconstruction import rendered_psnr

MAX_IMAGES = 512


def held_out_psnr(data) -> tuple:
    """Evaluators of `training.loop.train` for a reconstruction run: none where nothing is held out."""
    if not data.holdout_every:
        return ()
    source = sources.make_source(data, held_out=True)
    images = pipeline.examples(source, data, range(min(MAX_IMAGES, len(source))))
    return (lambda task, params: {"held_out_psnr": rendered_psnr(task, params, images)},)
