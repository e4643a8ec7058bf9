"""Training Stage B of Würstchen: Stage A's latents, denoised under the guidance of the semantic compressor, trained with it."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from fid_imagegen.data import buckets
from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.noise import example_keys, example_normal
from fid_imagegen.models.wuerstchen.compressor import build_compressor
from fid_imagegen.models.wuerstchen.stage_b import StageB
from fid_imagegen.tasks.latent import LatentDenoiser, chance, compressor_ratio, resized, split, unit, variables
from fid_imagegen.tasks.stage_a import build_vqgan
from fid_imagegen.tasks.text import TextSide, drop_text, no_text

STATISTICS_MOMENTUM = 0.99


class StageBTask:
    """Groups `stage_b`, `compressor` and a small `text` encoder are trained; `vqgan` and a CLIP tower are frozen.

    Conditions are dropped example by example, where the authors' code does so batch by batch: the same in the mean, and steadier.
    """

    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config = config
        self.vqgan = build_vqgan(config.vqgan)
        self.compressor, self.ratio = build_config_compressor(config.compressor), compressor_ratio(config)
        self.text = TextSide(config.text)
        fields = {
            name: tuple(value) if isinstance(value, list | tuple) else value for name, value in config.model.items()
        }
        fields |= {"dtype": jnp.dtype(config.model.dtype), "text": self.text.used}
        self.uses_latents = any(fields["inject_effnet"])
        self.denoiser = LatentDenoiser(StageB(**fields), config.form)
        compressor = ("compressor",) if self.uses_latents else ()
        self.trained = ("stage_b", *compressor, *self.text.trained)
        step = self.vqgan.stride * fields["patch_size"] * 2 ** (len(fields["c_hidden"]) - 1)
        buckets.check_multiples(config.data, step, "the stride of Stage A, the patches and the halvings of Stage B")

    def tokenizer(self, source, path):
        """The text encoder's, if there is one."""
        return self.text.tokenizer(source, path)

    def frozen(self) -> dict:
        """Stage A, abstract until `config.init.vqgan` fills it, and a CLIP tower."""
        size = self.config.data.image_size
        made = jax.eval_shape(
            lambda key: self.vqgan.init(key, jnp.zeros((1, size, size, self.config.data.channels)), False),
            jax.random.key(0),
        )
        return {"vqgan": made["params"], "vqgan_stats": {"batch_stats": made["batch_stats"]}} | self.text.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, statistics: the compressor's BatchNorm, and the moments of its latents)."""
        keys, size = jax.random.split(key, 3), self.config.compressor.size
        rows = self.config.data.image_size // self.vqgan.stride
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
        model, x = self.denoiser.model, jnp.zeros((1, rows, rows, self.config.vqgan.latent_channels))
        params["stage_b"] = model.init(keys[2], x, jnp.zeros((1,)), latents, text, method=model.end_to_end)["params"]
        return params, stats

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of {"image": uint8 NHWC, "tokens", "mask", "row": [B]}: (loss, (statistics, metrics))."""
        noise_key, net_key, compressor_key = jax.random.split(key, 3)
        keys_B = example_keys(noise_key, batch["row"])
        x0 = jax.lax.stop_gradient(self.encode(groups, unit(batch["image"])))
        latents, model_state = self._train_compressor(groups, model_state, batch["image"], compressor_key)
        loss_key, drop_key, text_key = split(keys_B, 3)
        conditions = (self.disturb(latents, drop_key), self._dropped_text(groups, batch, text_key))
        loss_B = self.denoiser.loss(groups["stage_b"], x0, conditions, keys_B=loss_key, key=net_key)
        metrics = {"latent_deviation": jnp.std(x0)}
        return jnp.mean(loss_B), (model_state, metrics)

    def encode(self, groups, images: Float[Array, "batch height width channels"]) -> Array:
        """Images in [0, 1] -> Stage A's latents as Stage B sees them."""
        latents = self.vqgan.apply(variables(groups, "vqgan"), images, False, method=self.vqgan.encode)
        return latents / self.config.latent_scale

    def decode(self, groups, latents: Float[Array, "batch rows columns channels"]) -> Array:
        """Stage B's latents -> images, clipped to [0, 1]."""
        scaled = latents * self.config.latent_scale
        return jnp.clip(self.vqgan.apply(variables(groups, "vqgan"), scaled, method=self.vqgan.decode), 0, 1)

    def compress(self, groups, images: Float[Array, "batch height width channels"]) -> Array:
        """The compressor's latents of images in [0, 1], as it is used: without a training step."""
        small = resized(images, self.ratio)
        stats = {"batch_stats": groups["compressor_stats"]["batch_stats"]}
        return self.compressor.apply({"params": groups["compressor"], **stats}, small, False)

    def condition(self, groups, latents, tokens, mask, latent_hw: tuple[int, int], *, guided: bool):
        """`cond` for `denoiser.advance`; with `guided` of 2 x batch: zero latents and the empty text without."""
        if self.uses_latents and guided:
            latents = jnp.concatenate([latents, jnp.zeros_like(latents)])
        text = self._text(groups, tokens, mask, guided=guided) if self.text.used else None
        latents = latents if self.uses_latents else None
        return self.denoiser.condition(groups["stage_b"], latents, text, latent_hw)

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside what Stage B and A make of its compressor latents."""
        images, count = unit(batch["image"]), batch["image"].shape[0]
        rows = images.shape[1] // self.vqgan.stride
        latents = self.compress(groups, images) if self.uses_latents else None
        tokens, mask = (batch.get(name) for name in ("tokens", "mask"))
        cond = self.condition(groups, latents, tokens, mask, (rows, rows), guided=False)
        shape = (rows, rows, self.config.vqgan.latent_channels)
        times = cosine.sampling_times(self.config.sampling.steps)
        made = self.denoiser.sample(
            groups["stage_b"], cond, jax.random.key(0), jnp.arange(count), shape, times=times, scale=None
        )
        return {"samples": 2 * rearrange([images, self.decode(groups, made)], "pair b h w c -> (b pair) h w c") - 1}

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

    def _dropped_text(self, groups, batch, keys_B):
        if not self.text.used:
            return None
        return self.text.encode(groups, *drop_text(batch, chance(keys_B, self.config.disturbance.text_dropped)))

    def _text(self, groups, tokens, mask, *, guided: bool):
        if guided:
            empty, shown = no_text(tokens)
            tokens, mask = jnp.concatenate([tokens, empty]), jnp.concatenate([mask, shown])
        return self.text.encode(groups, tokens, mask)


def build_config_compressor(compressor):
    """The compressor of `config.compressor`."""
    fields = {"channels": compressor.channels, "dtype": jnp.dtype(compressor.dtype)}
    if compressor.name == "conv":
        fields |= {"stride": compressor.stride, "widths": tuple(compressor.widths)}
    return build_compressor(compressor.name, **fields)
