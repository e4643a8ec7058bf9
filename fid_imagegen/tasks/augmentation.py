"""Training a small classifier to name the augmentation of an image. Its features are AYT's distance and need no download."""

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion.augmentations import augment, augmentations
from fid_imagegen.diffusion.noise import example_keys
from fid_imagegen.models.features.augmentation_net import AugmentationNet
from fid_imagegen.tasks.generator import to_float


class AugmentationTask:
    """Group `augmentation_net` is trained by cross-entropy."""

    trained = ("augmentation_net",)
    tracked: dict = {}
    num_classes = 0

    def __init__(self, config):
        self.config = config
        self.model = augmentation_net(config.model.widths, config.data.channels)

    def tokenizer(self, source, path) -> None:
        """No text."""

    def frozen(self) -> dict:
        """No frozen groups."""
        return {}

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained group, no model state)."""
        return {"augmentation_net": init_augmentation_net(self.model, self.config.data, key)}, {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Cross-entropy of {"image": uint8 NHWC, "row": [B]}, each under one augmentation: (loss, (model_state, metrics))."""
        label_key, key = jax.random.split(key)
        drawn = lambda key: jax.random.randint(key, (), 0, self.model.labels)  # noqa: E731
        label_B = jax.vmap(drawn)(example_keys(label_key, batch["row"]))
        images = augmented(example_keys(key, batch["row"]), to_float(batch["image"]), label_B)
        logits, _ = self.model.apply({"params": groups["augmentation_net"]}, images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label_B))
        return loss, (model_state, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == label_B)})

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside itself augmented, in all ways in turn: {"augmented": [2 count, height, width, channels]}."""
        images = to_float(batch["image"])
        index_B = jnp.arange(len(images))
        made = augmented(example_keys(jax.random.key(0), index_B), images, index_B % self.model.labels)
        return {"augmented": rearrange([images, made], "pair b h w c -> (b pair) h w c")}


def augmented(keys_B: Key[Array, "batch"], images: Array, label_B: Int[Array, "batch"]) -> Array:
    """Images in [-1, 1], each under the augmentation of its label.

    What is mixed into one is the image before it in the batch: alone in this it matters how a batch is cut.
    """
    return jax.vmap(augment)(keys_B, images, jnp.roll(images, 1, axis=0), label_B)


def augmentation_net(widths, channels: int) -> AugmentationNet:
    """The classifier of images of so many channels."""
    return AugmentationNet(labels=len(augmentations(channels)), widths=tuple(widths))


def init_augmentation_net(model: AugmentationNet, data, key: Key[Array, ""]) -> dict:
    """Fresh parameters for the images of `config.data`."""
    return model.init(key, jnp.zeros((1, data.image_size, data.image_size, data.channels)))["params"]
