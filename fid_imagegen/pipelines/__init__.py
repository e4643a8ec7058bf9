"""The user's API: load what was trained or converted, and generate with it."""

from fid_imagegen.pipelines.image_functions import ImageFunctionPipeline, RenderableFunctions
from fid_imagegen.pipelines.latent_diffusion import LatentDiffusionPipeline
from fid_imagegen.pipelines.wuerstchen import WuerstchenPipeline

__all__ = ["ImageFunctionPipeline", "LatentDiffusionPipeline", "RenderableFunctions", "WuerstchenPipeline"]
