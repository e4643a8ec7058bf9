"""Training Würstchen's previewer: latents of the semantic compressor -> small images, past Stages B and A."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.diffusion.distances import l2
from fid_imagegen.models.wuerstchen.previewer import Previewer
from fid_imagegen.tasks.compressor import CompressorLatents
from fid_imagegen.tasks.latent import beside, module_fields, resized, unit, variables
from fid_imagegen.tasks.perceptual import Perceptual


class PreviewerTask(CompressorLatents):
    """Group `previewer` is trained, `compressor` is frozen."""

    trained = ("previewer",)
    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        super().__init__(config)
        self.model = Previewer(image_channels=config.data.channels, **module_fields(config.model))
        self.perceptual = Perceptual(config)

    @property
    def size(self) -> int:
        """Pixels of the small images, along each side: 8 a latent position as published."""
        return self.rows * 2 ** (len(self.model.widths) - 1)

    def tokenizer(self, source, path) -> None:
        """No text."""

    def frozen(self) -> dict:
        """The compressor, abstract until `config.init.compressor` fills it, and LPIPS where it is the perceptual distance."""
        return super().frozen() | self.perceptual.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained group, statistics of its BatchNorm)."""
        made = self.model.init(key, jnp.zeros((1, self.rows, self.rows, self.config.compressor.channels)), False)
        return {"previewer": made["params"]}, {"previewer_stats": {"batch_stats": made["batch_stats"]}}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean squared error and perceptual distance on {"image": uint8 NHWC}: (loss, (statistics, metrics))."""
        images, weights = unit(batch["image"]), self.config.objective
        latents, truth = jax.lax.stop_gradient(self.latents(groups, images)), self._small(images)
        made, stats = self.model.apply(
            variables(groups | model_state, "previewer"), latents, True, mutable=["batch_stats"]
        )
        mse, perceptual = jnp.mean(l2(made, truth)), self.perceptual(groups, made, truth)
        metrics = {"psnr": -10 * jnp.log10(mse), "perceptual": perceptual}
        loss = weights.mse * mse + weights.perceptual_weight * perceptual
        return loss, (model_state | {"previewer_stats": stats}, metrics)

    def decode(self, groups, latents: Float[Array, "batch rows columns channels"]) -> Array:
        """The compressor's latents, as Stage B reads them -> images, clipped to [0, 1]."""
        made = self.model.apply(variables(groups, "previewer"), self.scaled(groups, latents), False)
        return jnp.clip(made, 0, 1)

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image, made small, beside what its latents tell."""
        images = unit(batch["image"])
        return {"previews": beside(self._small(images), self.decode(groups, self.compress(groups, images)))}

    def _small(self, images):
        return resized(images, Fraction(self.size, self.config.data.image_size))
