"""One-step generators of image functions, trained with JAX on TPU and GPU meshes. Nothing heavy is imported until used."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "ImageFunctionPipeline": "fid_imagegen.pipelines",
    "RenderableFunctions": "fid_imagegen.pipelines",
    "WuerstchenPipeline": "fid_imagegen.pipelines",
    "LatentDiffusionPipeline": "fid_imagegen.pipelines",
    "ImageFunctions": "fid_imagegen.models.image_function",
    "FunctionGenerator": "fid_imagegen.models.function_generator",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"found {name!r}, expected one of {sorted(__all__)} of fid_imagegen")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
