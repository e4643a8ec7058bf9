"""Training Stage C of Würstchen: text -> latents of the semantic compressor (arXiv 2306.00637, App. E.3)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.wuerstchen.stage_c import StageC
from fid_imagegen.models.wuerstchen.stage_c_dit import StageCTransformer
from fid_imagegen.tasks.compressor import CompressorLatents
from fid_imagegen.tasks.latent import LatentDenoiser, chance, module_fields, split, unit
from fid_imagegen.tasks.text import TextSide, guided_text

NETWORKS = {"convnext": StageC, "transformer": StageCTransformer}


class StageCTask(CompressorLatents):
    """Groups `stage_c` and a small `text` encoder are trained; `compressor` and a CLIP tower are frozen."""

    group = "stage_c"
    told_guidance = None
    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        super().__init__(config)
        self.text = TextSide(config.text)
        fields = module_fields(config.model)
        name = fields.pop("network")
        if name not in NETWORKS:
            raise ValueError(f"found network {name!r}, expected one of {sorted(NETWORKS)}; change config.model.network")
        self.denoiser = LatentDenoiser(NETWORKS[name](**fields), config.form, self.told_guidance)
        self.trained = (self.group, *self.text.trained)

    def tokenizer(self, source, path):
        """The text encoder's."""
        return self.text.tokenizer(source, path)

    def frozen(self) -> dict:
        """The compressor, abstract until `config.init.compressor` fills it, and a CLIP tower."""
        return super().frozen() | self.text.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, no statistics)."""
        keys, model = jax.random.split(key), self.denoiser.model
        x = jnp.zeros((1, self.rows, self.rows, self.config.compressor.channels))
        text = jnp.zeros((1, self.config.text.length, self.text.width))
        made = model.init(keys[0], x, jnp.zeros((1,)), text, method=model.end_to_end)
        return self.text.init(keys[1]) | {self.group: made["params"]}, {}

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
        loss_B = self.denoiser.loss(groups[self.group], x0, (text,), keys_B=loss_key, key=net_key)
        return jnp.mean(loss_B), (model_state, {"latent_deviation": jnp.std(x0)})

    def feature_key(self, tokenizer) -> dict:
        """What cached features depend on, beside data and weights: JSON types."""
        return {"compressor": self.config.compressor.to_dict()} | self.text.feature_key(tokenizer)

    def condition(self, groups, tokens, mask, negative: tuple | None, scale: Array | None):
        """`cond` for `denoiser.advance`. Where guidance mixes, of 2 x batch: then `negative` (tokens, mask), or the empty text.

        scale: what `denoiser.guidance` gives.
        """
        if self.denoiser.mixes(scale):
            tokens, mask = guided_text(tokens, mask, negative)
        return self.conditioned(groups, (self.text.encode(groups, tokens, mask),), scale)

    def conditioned(self, groups, conditions: tuple, scale: Array | None):
        """`cond` of what the network is given beside its latents."""
        return self.denoiser.condition(groups[self.group], *conditions)

    def preview(self, groups, batch) -> dict[str, Array]:
        """First three channels of each image's latents beside those sampled for its caption, +-3 deviations as black to white."""
        truth = self.latents(groups, unit(batch["image"]))
        none = jnp.zeros(len(truth), bool)

        def condition(scale):
            dropped = (none, ~none) if self.denoiser.mixes(scale) else (none,)
            text = jnp.concatenate([self.text.features(groups, batch, dropped_B) for dropped_B in dropped])
            return self.conditioned(groups, (text,), scale)

        made = self.denoiser.preview(groups[self.group], condition, len(truth), truth.shape[1:], self.config.sampling)
        pairs = rearrange([truth, made], "pair b h w c -> (b pair) h w c")[..., :3]
        return {"latents": jnp.clip(pairs / 3, -1, 1)}
