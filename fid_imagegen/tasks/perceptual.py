"""The perceptual distance of `config.objective`: LPIPS with its weights, or a stand-in that is named."""

import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from fid_imagegen.diffusion.distances import DISTANCES
from fid_imagegen.interop.lpips import load_lpips
from fid_imagegen.models.features.lpips import lpips_distance

STAND_INS = ("laplacian",)
Images = Float[Array, "batch height width channels"]


class Perceptual:
    """distance(groups, a, b): the batch's mean. ValueError for an unknown name; a stand-in is logged."""

    def __init__(self, config):
        self.name, self.files = config.objective.perceptual, config.lpips
        if self.name not in (*STAND_INS, "lpips"):
            raise ValueError(
                f"found perceptual distance {self.name!r}, expected 'lpips' or a stand-in of {STAND_INS}; "
                "change config.objective.perceptual"
            )
        if self.name in STAND_INS:
            logging.warning("perceptual distance %r: a stand-in for LPIPS, without its weights", self.name)

    def frozen(self) -> dict:
        """The group `lpips`, where it is the distance."""
        return {"lpips": load_lpips(self.files.vgg16, self.files.heads)} if self.name == "lpips" else {}

    def __call__(self, groups, a: Images, b: Images) -> Float[Array, ""]:
        """Of images in [0, 1]."""
        a, b = 2 * a - 1, 2 * b - 1
        return jnp.mean(lpips_distance(groups["lpips"], a, b) if self.name == "lpips" else DISTANCES[self.name](a, b))
