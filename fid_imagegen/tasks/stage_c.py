"""Training Stage C of Würstchen: text -> latents of the semantic compressor (arXiv 2306.00637, App. E.3)."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.wuerstchen.compressor import PUBLISHED
from fid_imagegen.models.wuerstchen.stage_c import StageC
from fid_imagegen.models.wuerstchen.stage_c_dit import StageCTransformer
from fid_imagegen.tasks.latent import LatentDenoiser, chance, compressor_ratio, resized, split, unit
from fid_imagegen.tasks.stage_b import build_config_compressor
from fid_imagegen.tasks.text import TextSide, no_text

NETWORKS = {"convnext": StageC, "transformer": StageCTransformer}


class StageCTask:
    """Groups `stage_c` and a small `text` encoder are trained; `compressor` and a CLIP tower are frozen."""

    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config = config
        self.compressor, self.ratio = build_config_compressor(config.compressor), compressor_ratio(config)
        self.text = TextSide(config.text)
        fields = dict(config.model)
        name = fields.pop("network")
        if name not in NETWORKS:
            raise ValueError(f"found network {name!r}, expected one of {sorted(NETWORKS)}; change config.model.network")
        if config.latent_scale not in ("statistics", "published"):
            raise ValueError(
                f"found latent_scale {config.latent_scale!r}, expected 'statistics' or 'published'; change config.latent_scale"
            )
        self.denoiser = LatentDenoiser(NETWORKS[name](**fields | {"dtype": jnp.dtype(fields["dtype"])}), config.form)
        self.trained = ("stage_c", *self.text.trained)

    @property
    def stride(self) -> Fraction:
        """Pixels of the training images per latent position, along each side: 128/3 in the public model."""
        return self.compressor.stride / self.ratio

    def tokenizer(self, source, path):
        """The text encoder's."""
        return self.text.tokenizer(source, path)

    def frozen(self) -> dict:
        """The compressor with its statistics, abstract until `config.init.compressor` fills them, and a CLIP tower."""
        size, channels = self.config.compressor.size, self.config.compressor.channels
        made = jax.eval_shape(
            lambda key: self.compressor.init(key, jnp.zeros((1, size, size, self.config.data.channels)), False),
            jax.random.key(0),
        )
        moments = jax.ShapeDtypeStruct((channels,), jnp.float32)
        stats = {"batch_stats": made["batch_stats"], "latents": {"mean": moments, "variance": moments}}
        return {"compressor": made["params"], "compressor_stats": stats} | self.text.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, no statistics)."""
        keys, rows = jax.random.split(key), -(-self.config.compressor.size // self.compressor.stride)
        model, x = self.denoiser.model, jnp.zeros((1, rows, rows, self.config.compressor.channels))
        text = jnp.zeros((1, self.config.text.length, self.text.width))
        made = model.init(keys[0], x, jnp.zeros((1,)), text, method=model.end_to_end)
        return self.text.init(keys[1]) | {"stage_c": made["params"]}, {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of {"image": uint8 NHWC, "tokens", "mask", "row": [B]}: (loss, (model_state, metrics)).

        Cached features stand in place of what they are made of: "latents", the compressor's own, of "image", and "text" of
        "tokens" and "mask".
        """
        noise_key, net_key = jax.random.split(key)
        loss_key, drop_key = split(example_keys(noise_key, batch["row"]), 2)
        raw = batch["latents"] if "latents" in batch else self.compress(groups, unit(batch["image"]))
        x0 = jax.lax.stop_gradient(self.scaled(groups, raw))
        text = self.text.features(groups, batch, chance(drop_key, self.config.text_dropped))
        loss_B = self.denoiser.loss(groups["stage_c"], x0, (text,), keys_B=loss_key, key=net_key)
        return jnp.mean(loss_B), (model_state, {"latent_deviation": jnp.std(x0)})

    def latents(self, groups, images: Float[Array, "batch height width channels"]) -> Array:
        """Images in [0, 1] -> latents at Stage C's scale."""
        return self.scaled(groups, self.compress(groups, images))

    def compress(self, groups, images: Float[Array, "batch height width channels"]) -> Array:
        """Images in [0, 1] -> the compressor's latents."""
        small = resized(images, self.ratio)
        stats = {"batch_stats": groups["compressor_stats"]["batch_stats"]}
        return self.compressor.apply({"params": groups["compressor"], **stats}, small, False)

    def feature_key(self, tokenizer) -> dict:
        """What cached features depend on, beside data and weights: JSON types."""
        return {"compressor": self.config.compressor.to_dict()} | self.text.feature_key(tokenizer)

    def scaled(self, groups, latents: Float[Array, "batch rows columns channels"]) -> Array:
        """The compressor's latents -> those at Stage C's scale."""
        mean, deviation = self._scale(groups)
        return (latents - mean) / deviation

    def unscaled(self, groups, latents: Float[Array, "batch rows columns channels"]) -> Array:
        """Latents at Stage C's scale -> the compressor's, which Stage B reads."""
        mean, deviation = self._scale(groups)
        return latents * deviation + mean

    def condition(self, groups, tokens, mask, negative: tuple | None, *, guided: bool):
        """`cond` for `denoiser.advance`; with `guided` of 2 x batch: `negative` (tokens, mask), or the empty text, without."""
        if guided:
            without = negative or no_text(tokens)
            tokens, mask = jnp.concatenate([tokens, without[0]]), jnp.concatenate([mask, without[1]])
        return self.denoiser.condition(groups["stage_c"], self.text.encode(groups, tokens, mask))

    def preview(self, groups, batch) -> dict[str, Array]:
        """First three channels of each image's latents beside those sampled for its caption, +-3 deviations as black to white."""
        truth = self.latents(groups, unit(batch["image"]))
        sampling, count = self.config.sampling, truth.shape[0]
        none = jnp.zeros(count, bool)
        text = jnp.concatenate([self.text.features(groups, batch, dropped) for dropped in (none, ~none)])
        cond = self.denoiser.condition(groups["stage_c"], text)
        made = self.denoiser.sample(
            groups["stage_c"],
            cond,
            jax.random.key(0),
            jnp.arange(count),
            truth.shape[1:],
            times=cosine.sampling_times(sampling.steps),
            scale=sampling.guidance,
        )
        pairs = rearrange([truth, made], "pair b h w c -> (b pair) h w c")[..., :3]
        return {"latents": jnp.clip(pairs / 3, -1, 1)}

    def _scale(self, groups) -> tuple[Array | float, Array | float]:
        if self.config.latent_scale == "published":
            return PUBLISHED["mean"], PUBLISHED["deviation"]
        moments = groups["compressor_stats"]["latents"]
        return moments["mean"], jnp.sqrt(moments["variance"] + 1e-6)
