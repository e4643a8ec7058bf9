"""Training Stage B of Würstchen: Stage A's latents, denoised under the guidance of the semantic compressor, trained with it."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.data import buckets
from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.noise import example_keys, example_normal
from fid_imagegen.models.wuerstchen.stage_b import StageB
from fid_imagegen.tasks.compressor import build_config_compressor, compress, imagenet_backbone
from fid_imagegen.tasks.first_stage import StageALatents
from fid_imagegen.tasks.latent import (
    LatentDenoiser,
    beside,
    chance,
    compressor_ratio,
    module_fields,
    resized,
    split,
    unit,
)
from fid_imagegen.tasks.text import TextSide, drop_text, guided_text

STATISTICS_MOMENTUM = 0.99


class StageBTask:
    """Groups `stage_b`, `compressor` and a small `text` encoder are trained; `vqgan` and a CLIP tower are frozen.

    Conditions are dropped example by example, where the authors' code does so batch by batch: the same in the mean, and steadier.
    """

    group = "stage_b"
    told_guidance = None
    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config = config
        self.first_stage = StageALatents(config.vqgan, config.latent_scale)
        self.compressor, self.ratio = build_config_compressor(config.compressor), compressor_ratio(config)
        self.text = TextSide(config.text)
        self.uses_latents = any(config.model.inject_effnet)
        if not (self.uses_latents or self.text.used):
            raise ValueError(
                "found a Stage B with neither compressor latents nor text, expected one of them or both; change "
                "config.model.inject_effnet or config.text.encoder"
            )
        model = StageB(text=self.text.used, **module_fields(config.model))
        self.denoiser = LatentDenoiser(model, config.form, self.told_guidance)
        compressor = ("compressor",) if self.uses_latents else ()
        self.trained = (self.group, *compressor, *self.text.trained)
        step = self.first_stage.stride * self.denoiser.model.step
        buckets.check_multiples(config.data, step, "the stride of Stage A, the patches and the halvings of Stage B")

    @property
    def stride(self) -> Fraction:
        """Pixels of an image per position of the compressor's latents, along each side: 128/3 in the public model."""
        return self.compressor.stride / self.ratio

    def tokenizer(self, source, path):
        """The text encoder's, if there is one."""
        return self.text.tokenizer(source, path)

    def frozen(self) -> dict:
        """Stage A, abstract until `config.init.vqgan` fills it, and a CLIP tower."""
        return self.first_stage.frozen() | self.text.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, statistics: the compressor's BatchNorm, and the moments of its latents)."""
        keys, size = jax.random.split(key, 3), self.config.compressor.size
        rows = self.config.data.image_size // self.first_stage.stride
        params, stats, latents = self.text.init(keys[0]), {}, None
        if self.uses_latents:
            images = jnp.zeros((1, size, size, self.config.data.channels))
            latents, made = self.compressor.init_with_output(keys[1], images, False)
            params["compressor"] = made["params"]
            channels = self.config.compressor.channels
            stats["compressor_stats"] = {"batch_stats": made["batch_stats"]} | {
                "latents": {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}
            }
        text = jnp.zeros((1, self.config.text.length, self.text.width)) if self.text.used else None
        model, x = self.denoiser.model, jnp.zeros((1, rows, rows, self.first_stage.channels))
        params[self.group] = model.init(keys[2], x, jnp.zeros((1,)), latents, text, method=model.end_to_end)["params"]
        return params, stats

    def pretrained(self) -> dict:
        """Parts of fresh groups, by group, for which there are public weights: the compressor's backbone, ImageNet's.

        Read once, at a run's first start. Raises ValueError where `config.init.compressor` gives the group as well.
        """
        if not self.uses_latents:
            return {}
        weights, start = self.config.compressor.weights, self.config.init.compressor
        if weights and start:
            raise ValueError(
                f"found config.compressor.weights {weights!r} beside config.init.compressor {start!r}, expected one of them; "
                "set the other to ''"
            )
        return {} if start else imagenet_backbone(self.config.compressor, self.compressor)

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of {"image": uint8 NHWC, "tokens", "mask", "row": [B]}: (loss, (statistics, metrics))."""
        noise_key, net_key, compressor_key = jax.random.split(key, 3)
        keys_B = example_keys(noise_key, batch["row"])
        x0 = jax.lax.stop_gradient(self.first_stage.encode(groups, unit(batch["image"])))
        latents, model_state = self._train_compressor(groups, model_state, batch["image"], compressor_key)
        loss_key, drop_key, text_key = split(keys_B, 3)
        conditions = (self.disturb(latents, drop_key), self.dropped_text(groups, batch, text_key))
        loss_B = self.denoiser.loss(groups[self.group], x0, conditions, keys_B=loss_key, key=net_key)
        metrics = {"latent_deviation": jnp.std(x0)}
        return jnp.mean(loss_B), (model_state, metrics)

    def compress(self, groups, images: Float[Array, "batch height width channels"]) -> Array:
        """The compressor's latents of images in [0, 1], as it is used: without a training step."""
        return compress(self.compressor, groups, resized(images, self.ratio))

    def condition(
        self, groups, latents, tokens, mask, negative: tuple | None, latent_hw: tuple[int, int], scale: Array | None
    ):
        """`cond` for `denoiser.advance`. Where guidance mixes, of 2 x batch: then zero latents, and `negative` or the empty text.

        latents: the compressor's, or None for a Stage B on text alone. scale: what `denoiser.guidance` gives.
        """
        mixes, text = self.denoiser.mixes(scale), None
        if self.uses_latents and mixes:
            latents = jnp.concatenate([latents, jnp.zeros_like(latents)])
        if self.text.used:
            tokens, mask = guided_text(tokens, mask, negative) if mixes else (tokens, mask)
            text = self.text.encode(groups, tokens, mask)
        return self.conditioned(groups, (latents, text), latent_hw, scale)

    def conditioned(self, groups, conditions: tuple, latent_hw: tuple[int, int], scale: Array | None):
        """`cond` of what the network is given beside its latents."""
        return self.denoiser.condition(groups[self.group], *conditions, latent_hw)

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside what Stage B and A make of its compressor latents and caption."""
        images, rows = unit(batch["image"]), batch["image"].shape[1] // self.first_stage.stride
        latents = self.compress(groups, images) if self.uses_latents else None
        text = [batch.get(name) for name in ("tokens", "mask")]
        made = self.denoiser.preview(
            groups[self.group],
            lambda scale: self.condition(groups, latents, *text, None, (rows, rows), scale),
            len(images),
            (rows, rows, self.first_stage.channels),
            self.config.sampling,
        )
        return {"samples": beside(images, self.first_stage.decode(groups, made))}

    def disturb(self, latents, keys_B: Key[Array, "batch"]):
        """Compressor latents as Stage C will not quite hit them: a share zeroed, a share noised up to level `noised_until`."""
        if latents is None:
            return None
        rates, (zero_B, noise_B, level_B, eps_B) = self.config.disturbance, split(keys_B, 4)
        level = rates.noised_until * jax.vmap(jax.random.uniform)(level_B)
        noised = cosine.add_noise(latents, example_normal(eps_B, latents.shape[1:]), level)
        spread = lambda flags_B: flags_B[:, None, None, None]  # noqa: E731
        disturbed = jnp.where(spread(chance(noise_B, rates.noised)), noised, latents)
        return jnp.where(spread(chance(zero_B, rates.zeroed)), 0.0, disturbed)

    def _train_compressor(self, groups, model_state, images, key):
        """(latents, statistics after a step of training)."""
        if not self.uses_latents:
            return None, model_state
        stats = model_state["compressor_stats"]
        latents, changed = self.compressor.apply(
            {"params": groups["compressor"], "batch_stats": stats["batch_stats"]},
            resized(unit(images), self.ratio),
            True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        seen = jax.lax.stop_gradient(latents)
        moments = {"mean": jnp.mean(seen, axis=(0, 1, 2)), "variance": jnp.var(seen, axis=(0, 1, 2))}
        mix = lambda old, new: STATISTICS_MOMENTUM * old + (1 - STATISTICS_MOMENTUM) * new  # noqa: E731
        tracked = {name: mix(stats["latents"][name], moments[name]) for name in moments}
        return latents, model_state | {"compressor_stats": {"batch_stats": changed["batch_stats"], "latents": tracked}}

    def dropped_text(self, groups, batch, keys_B: Key[Array, "batch"]):
        """One vector a token, a share of the texts empty; None for a Stage B without text."""
        if not self.text.used:
            return None
        return self.text.encode(groups, *drop_text(batch, chance(keys_B, self.config.disturbance.text_dropped)))
