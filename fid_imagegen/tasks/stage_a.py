"""Training Stage A of Würstchen: an image tokenizer with 4x4 pixels a position (arXiv 2306.00637, App. E.1)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.diffusion.distances import l2
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.wuerstchen.stage_a import Discriminator, PaellaVQ
from fid_imagegen.tasks.latent import beside, chance, module_fields, unit, variables
from fid_imagegen.tasks.perceptual import Perceptual


class StageATask:
    """Groups `vqgan` and `discriminator` are trained by one gradient: each side's loss stops at the other's parameters.

    vqgan: mse + perceptual + adversarial (from `adversarial_start` on) + codebook + commitment, the quantiser left out for
    a share of the examples, so that the decoder learns the unquantised latents that Stages B and C work with.
    """

    trained = ("vqgan", "discriminator")
    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config, self.weights = config, config.objective
        self.model = build_vqgan(config.model)
        dtype = jnp.dtype(config.model.dtype)
        self.discriminator = Discriminator(widths=tuple(config.discriminator.widths), dtype=dtype)
        self.perceptual = Perceptual(config)

    def tokenizer(self, source, path) -> None:
        """No text."""

    def frozen(self) -> dict:
        """LPIPS where it is the perceptual distance."""
        return self.perceptual.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, statistics of BatchNorm and spectral normalisation)."""
        size, keys = self.config.data.image_size, jax.random.split(key)
        images = jnp.zeros((1, size, size, self.config.data.channels))
        made = {
            "vqgan": self.model.init(keys[0], images, True),
            "discriminator": self.discriminator.init(keys[1], images, True),
        }
        params = {name: variables.pop("params") for name, variables in made.items()}
        return params, {f"{name}_stats": variables for name, variables in made.items()}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Both sides' losses on {"image": uint8 NHWC, "row": [B]}: (their sum, (statistics, metrics))."""
        images, weights = unit(batch["image"]), self.weights
        apply = functools.partial(self.model.apply, variables(groups | model_state, "vqgan"))
        latents, vqgan_stats = apply(images, True, mutable=["batch_stats"], method=self.model.encode)
        codes, _, codebook, commitment = apply(latents, method=self.model.quantise)
        dropped_B = chance(example_keys(key, batch["row"]), weights.quantiser_drop)
        made = apply(jnp.where(dropped_B[:, None, None, None], latents, codes), method=self.model.decode)

        mse, perceptual = jnp.mean(l2(made, images)), self.perceptual(groups, made, images)
        judge = functools.partial(self._judge, groups, model_state)
        fooled, _ = judge(made, frozen=True)
        real, stats = judge(images, frozen=False)
        fake, stats = judge(jax.lax.stop_gradient(made), frozen=False, stats=stats)
        adversarial = jnp.mean(jax.nn.softplus(-fooled))
        scale = jnp.where(step < weights.adversarial_start, 0.0, weights.adversarial)
        vqgan = weights.mse * mse + weights.perceptual_weight * perceptual + scale * adversarial
        vqgan += codebook + weights.commitment * commitment
        discriminator = (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2
        metrics = {
            "psnr": -10 * jnp.log10(mse),
            "perceptual": perceptual,
            "adversarial": adversarial,
            "discriminator": discriminator,
            "codebook": codebook,
        }
        return vqgan + discriminator, ({"vqgan_stats": vqgan_stats, "discriminator_stats": stats}, metrics)

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside its reconstruction without the quantiser: {"reconstructions": [2 count, height, width, channels]}."""
        images = unit(batch["image"])
        return {"reconstructions": beside(images, reconstruct(self.model, groups, images))}

    def _judge(self, groups, model_state, images, *, frozen: bool, stats=None):
        """(logits, statistics after it); `frozen`: a judge that does not learn from what it sees."""
        params, stats = groups["discriminator"], stats or model_state["discriminator_stats"]
        if frozen:
            return self.discriminator.apply({"params": jax.lax.stop_gradient(params), **stats}, images, False), stats
        return self.discriminator.apply({"params": params, **stats}, images, True, mutable=["batch_stats"])


def build_vqgan(model) -> PaellaVQ:
    """Stage A of `config.model`."""
    return PaellaVQ(**module_fields(model))


def reconstruct(
    model: PaellaVQ, groups, images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """Images in [0, 1] through encoder and decoder, without the quantiser."""
    apply = functools.partial(model.apply, variables(groups, "vqgan"))
    return apply(apply(images, False, method=model.encode), method=model.decode)
