"""The semantic compressor that Stage B trained, frozen: what tasks on its latents share."""

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from fid_imagegen.interop.efficientnet import load_features
from fid_imagegen.models.wuerstchen.compressor import (
    PUBLISHED,
    ConvCompressor,
    EfficientNetCompressor,
    build_compressor,
)
from fid_imagegen.models.wuerstchen.efficientnet import EfficientNetV2Features
from fid_imagegen.tasks.latent import compressor_ratio, resized

Images = Float[Array, "batch height width channels"]
Latents = Float[Array, "batch rows columns channels"]


class CompressorLatents:
    """A task on the latents of `config.compressor`, put to the scale `config.latent_scale`."""

    def __init__(self, config):
        self.config = config
        self.compressor, self.ratio = build_config_compressor(config.compressor), compressor_ratio(config)
        if config.latent_scale not in ("statistics", "published"):
            raise ValueError(
                f"found latent_scale {config.latent_scale!r}, expected 'statistics' or 'published'; change config.latent_scale"
            )

    @property
    def rows(self) -> int:
        """Latent positions along each side of a training image."""
        return -(-self.config.compressor.size // self.compressor.stride)

    def frozen(self) -> dict:
        """The compressor with its statistics, abstract until `config.init.compressor` fills them."""
        size, channels = self.config.compressor.size, self.config.compressor.channels
        made = jax.eval_shape(
            lambda key: self.compressor.init(key, jnp.zeros((1, size, size, self.config.data.channels)), False),
            jax.random.key(0),
        )
        moments = jax.ShapeDtypeStruct((channels,), jnp.float32)
        stats = {"batch_stats": made["batch_stats"], "latents": {"mean": moments, "variance": moments}}
        return {"compressor": made["params"], "compressor_stats": stats}

    def latents(self, groups, images: Images) -> Latents:
        """Images in [0, 1] -> latents at the task's scale."""
        return self.scaled(groups, self.compress(groups, images))

    def compress(self, groups, images: Images) -> Latents:
        """Images in [0, 1] -> the compressor's latents."""
        return compress(self.compressor, groups, resized(images, self.ratio))

    def scaled(self, groups, latents: Latents) -> Latents:
        """The compressor's latents -> those at the task's scale."""
        mean, deviation = self._moments(groups)
        return (latents - mean) / deviation

    def unscaled(self, groups, latents: Latents) -> Latents:
        """Latents at the task's scale -> the compressor's, which Stage B reads."""
        mean, deviation = self._moments(groups)
        return latents * deviation + mean

    def _moments(self, groups) -> tuple[Array | float, Array | float]:
        if self.config.latent_scale == "published":
            return PUBLISHED["mean"], PUBLISHED["deviation"]
        moments = groups["compressor_stats"]["latents"]
        return moments["mean"], jnp.sqrt(moments["variance"] + 1e-6)


def compress(compressor, groups, images: Images) -> Latents:
    """Latents of images in [0, 1] of the compressor's size, as it is used: without a training step."""
    stats = {"batch_stats": groups["compressor_stats"]["batch_stats"]}
    return compressor.apply({"params": groups["compressor"], **stats}, images, False)


def build_config_compressor(compressor):
    """The compressor of `config.compressor`."""
    fields = {"channels": compressor.channels, "dtype": jnp.dtype(compressor.dtype)}
    if compressor.name == "conv":
        fields |= {"stride": compressor.stride, "widths": tuple(compressor.widths)}
    return build_compressor(compressor.name, **fields)


def imagenet_backbone(config, compressor: EfficientNetCompressor | ConvCompressor) -> dict:
    """The backbone's parameters and statistics by group, read from `config.weights`; nothing where that is empty.

    A backbone that starts without them is logged. Raises FileNotFoundError, and ValueError for weights that do not fit.
    """
    public = isinstance(compressor, EfficientNetCompressor)
    if config.weights and not public:
        raise ValueError(
            f"found config.compressor.weights {config.weights!r} for compressor {config.name!r}, expected none: only "
            "EfficientNetV2 has public weights; set config.compressor.weights=''"
        )
    if not config.weights:
        if public:
            logging.warning(
                "the semantic compressor %r starts from random weights, where the paper starts from ImageNet's; "
                "config.compressor.weights reads them",
                config.name,
            )
        return {}
    made = load_features(EfficientNetV2Features(compressor.variant), config.weights)
    stats = {"batch_stats": {"backbone": made["batch_stats"]}}
    return {"compressor": {"backbone": made["params"]}, "compressor_stats": stats}
