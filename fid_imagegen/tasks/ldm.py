"""Training the baseline of Würstchen's App. E.4: text -> latents of a first stage, by one U-Net (arXiv 2306.00637)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from fid_imagegen.data import buckets
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.wuerstchen.ldm import LatentUNet
from fid_imagegen.tasks.first_stage import build_first_stage
from fid_imagegen.tasks.latent import LatentDenoiser, beside, chance, module_fields, split, unit
from fid_imagegen.tasks.text import TextSide, guided_text


class LDMTask:
    """Groups `ldm` and a small `text` encoder are trained; `autoencoder`, or Stage A's `vqgan`, and a CLIP tower are frozen."""

    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config = config
        self.first_stage = build_first_stage(config.first_stage)
        self.text = TextSide(config.text)
        if not self.text.used:
            raise ValueError(
                "found text encoder 'none', expected one: text is all that an LDM is told; change config.text"
            )
        model = LatentUNet(channels=self.first_stage.channels, **module_fields(config.model))
        self.denoiser = LatentDenoiser(model, config.form)
        step = self.first_stage.stride * model.step
        buckets.check_multiples(config.data, step, "the stride of the first stage and the halvings of the U-Net")
        self.trained = ("ldm", *self.text.trained)

    def tokenizer(self, source, path):
        """The text encoder's."""
        return self.text.tokenizer(source, path)

    def frozen(self) -> dict:
        """The first stage, abstract until `config.init` fills it, and a CLIP tower."""
        return self.first_stage.frozen() | self.text.frozen()

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, no statistics)."""
        keys, model, rows = jax.random.split(key), self.denoiser.model, self._rows(self.config.data.image_size)
        text = jnp.zeros((1, self.config.text.length, self.text.width))
        x = jnp.zeros((1, rows, rows, self.first_stage.channels))
        made = model.init(keys[0], x, jnp.zeros((1,)), text, method=model.end_to_end)
        return self.text.init(keys[1]) | {"ldm": made["params"]}, {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean loss of {"image": uint8 NHWC, "tokens", "mask", "row": [B]}: (loss, (model_state, metrics))."""
        noise_key, net_key = jax.random.split(key)
        loss_key, drop_key = split(example_keys(noise_key, batch["row"]), 2)
        x0 = jax.lax.stop_gradient(self.first_stage.encode(groups, unit(batch["image"])))
        text = self.text.features(groups, batch, chance(drop_key, self.config.text_dropped))
        loss_B = self.denoiser.loss(groups["ldm"], x0, (text,), keys_B=loss_key, key=net_key)
        return jnp.mean(loss_B), (model_state, {"latent_deviation": jnp.std(x0)})

    def condition(
        self,
        groups,
        latents: None,
        tokens,
        mask,
        negative: tuple | None,
        latent_hw: tuple[int, int],
        scale: Array | None,
    ):
        """`cond` for `denoiser.advance`, as Stage B's: without compressor latents, and the same for every size."""
        tokens, mask = guided_text(tokens, mask, negative) if self.denoiser.mixes(scale) else (tokens, mask)
        return self.denoiser.condition(groups["ldm"], self.text.encode(groups, tokens, mask))

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside one sampled for its caption."""
        images, rows = unit(batch["image"]), self._rows(batch["image"].shape[1])
        made = self.denoiser.preview(
            groups["ldm"],
            lambda scale: self.condition(groups, None, batch["tokens"], batch["mask"], None, (rows, rows), scale),
            len(images),
            (rows, rows, self.first_stage.channels),
            self.config.sampling,
        )
        return {"samples": beside(images, self.first_stage.decode(groups, made))}

    def _rows(self, size: int) -> int:
        return size // self.first_stage.stride
