"""The first stage of latent diffusion: images <-> the latents that are denoised, by a network that is frozen."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from fid_imagegen.interop.autoencoder_kl import load_autoencoder_kl
from fid_imagegen.models.autoencoder_kl import AutoencoderKL
from fid_imagegen.tasks.latent import module_fields, variables
from fid_imagegen.tasks.stage_a import build_vqgan

Images = Float[Array, "batch height width channels"]
Latents = Float[Array, "batch rows columns latents"]


class StageALatents:
    """Stage A of a config; its latents, before the quantiser, are divided by `divisor` (0.3764 as published)."""

    def __init__(self, config, divisor: float):
        self.model, self.divisor = build_vqgan(config), divisor
        self.stride, self.channels = self.model.stride, self.model.latent_channels

    def frozen(self) -> dict:
        """Group `vqgan` and its statistics, abstract until `config.init.vqgan` fills them."""
        made = _abstract(self.model, self.stride, self.model.image_channels, False)
        return {"vqgan": made["params"], "vqgan_stats": {"batch_stats": made["batch_stats"]}}

    def encode(self, groups: Mapping, images: Images) -> Latents:
        """Images in [0, 1] -> latents as they are denoised."""
        return self._apply(groups, images, False, method=self.model.encode) / self.divisor

    def decode(self, groups: Mapping, latents: Latents) -> Images:
        """Latents -> images, clipped to [0, 1]."""
        return jnp.clip(self._apply(groups, latents * self.divisor, method=self.model.decode), 0, 1)

    def _apply(self, groups, *arguments, method):
        return self.model.apply(variables(groups, "vqgan"), *arguments, method=method)


class KLLatents:
    """An AutoencoderKL; the means of its latents are divided by `divisor` (1 / 0.18215 as published).

    Its authors draw latents around the means, with deviations far below those of any noise level that matters.
    """

    def __init__(self, config, divisor: float):
        fields = module_fields(config)
        self.weights, self.divisor = fields.pop("weights"), divisor
        self.model = AutoencoderKL(**fields)
        self.stride, self.channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels

    def frozen(self) -> dict:
        """Group `autoencoder`, read from `config.first_stage.weights`."""
        return {"autoencoder": load_autoencoder_kl(self.model, self.weights)}

    def encode(self, groups: Mapping, images: Images) -> Latents:
        """Images in [0, 1] -> latents as they are denoised."""
        return self._apply(groups, 2 * images - 1, method=self.model.encode)[0] / self.divisor

    def decode(self, groups: Mapping, latents: Latents) -> Images:
        """Latents -> images, clipped to [0, 1]."""
        return jnp.clip((self._apply(groups, latents * self.divisor, method=self.model.decode) + 1) / 2, 0, 1)

    def _apply(self, groups, *arguments, method):
        return self.model.apply({"params": groups["autoencoder"]}, *arguments, method=method)


FirstStage = StageALatents | KLLatents
NETWORKS = {"kl": KLLatents, "vqgan": StageALatents}


def build_first_stage(config: ConfigDict) -> FirstStage:
    """Of `config.first_stage`: the network's name and fields, and the factor that scales its latents for the denoiser.

    Raises ValueError for an unknown name.
    """
    fields = dict(config)
    name, factor = fields.pop("network"), fields.pop("scaling_factor")
    if name not in NETWORKS:
        raise ValueError(
            f"found first stage {name!r}, expected one of {sorted(NETWORKS)}; change config.first_stage.network"
        )
    return NETWORKS[name](ConfigDict(fields), 1 / factor)


def _abstract(model, side: int, channels: int, *arguments):
    image = jnp.zeros((1, side, side, channels))
    return jax.eval_shape(lambda key: model.init(key, image, *arguments), jax.random.key(0))
