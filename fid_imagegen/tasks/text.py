"""The text side of a task: its tokenizer, its encoder, and what stands for no text."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, Key

from fid_imagegen.data.captions import texts
from fid_imagegen.data.tokenizer import Tokenizer, clip_tokenizer, load_tokenizer, train_bpe
from fid_imagegen.interop.clip import load_clip
from fid_imagegen.models.text.clip import TOWERS, CLIPTextEncoder
from fid_imagegen.models.text.small import SmallTextEncoder

GROUP, EMPTY = "text", "empty_text"
Batch = Mapping[str, Array]


class TextSide:
    """`config.text`: encoder "none", "small" (trained with the task, its BPE on the set's captions), or a frozen tower of CLIP.

    Raises ValueError for an unknown encoder.
    """

    def __init__(self, config):
        self.config = config
        names = ("none", "small", *TOWERS)
        if config.encoder not in names:
            raise ValueError(
                f"found text encoder {config.encoder!r}, expected one of {names}; change config.text.encoder"
            )
        dtype = jnp.dtype(config.dtype)
        if config.encoder == "small":
            fields = {name: config[name] for name in ("vocabulary", "length", "width", "layers", "heads")}
            self.model = SmallTextEncoder(**fields, dtype=dtype)
        elif self.used:
            self.model = CLIPTextEncoder(**TOWERS[config.encoder], dtype=dtype)

    @property
    def used(self) -> bool:
        return self.config.encoder != "none"

    @property
    def trained(self) -> tuple[str, ...]:
        """The group that is trained with the task, if any."""
        return (GROUP,) if self.config.encoder == "small" else ()

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.model.width

    def tokenizer(self, source: Any, path: epath.Path) -> Tokenizer | None:
        """The one saved at `path`, else CLIP's from `config.text.tokenizer`, else one trained on the captions of `source`."""
        if not self.used:
            return None
        if path.exists():
            return load_tokenizer(path)
        if self.config.encoder != "small":
            return clip_tokenizer(self.config.tokenizer)
        return train_bpe(texts(source), vocabulary=self.config.vocabulary, length=self.config.length)

    def frozen(self) -> dict:
        """CLIP's tower, read from `config.text.weights`."""
        return {GROUP: load_clip(self.config.weights, self.model)} if self.used and not self.trained else {}

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh parameters of the group, if it is trained."""
        if not self.trained:
            return {}
        tokens = jnp.zeros((1, self.config.length), jnp.int32)
        return {GROUP: self.model.init(key, tokens)["params"]}

    def encode(
        self, groups: Mapping, tokens_BT: Int[Array, "batch tokens"], mask_BT: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens features"]:
        """One vector a token."""
        return self.model.apply({"params": groups[GROUP]}, tokens_BT, mask_BT)["tokens"]

    def features(
        self, groups: Mapping, batch: Batch, dropped_B: Bool[Array, "batch"]
    ) -> Float[Array, "batch tokens features"]:
        """One vector a token, the empty text's where `dropped_B`: of a batch's tokens, or its cached "text"."""
        if "text" in batch:
            return jnp.where(dropped_B[:, None, None], groups[EMPTY]["tokens"], batch["text"])
        return self.encode(groups, *drop_text(batch, dropped_B))

    def feature_key(self, tokenizer: Tokenizer) -> dict:
        """What a frozen encoder's cached features depend on, beside its weights: JSON types."""
        if self.trained:
            return {"text": None, "tokenizer": None}
        digest = hashlib.sha256(tokenizer.json().encode()).hexdigest()
        return {"text": {name: self.config[name] for name in ("encoder", "dtype")}, "tokenizer": digest}


def no_text(tokens_BT: Int[Array, "batch tokens"]) -> tuple[Int[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """The empty text, as often as there are texts: start, end and padding, whichever numbers the tokenizer gives them.

    Every text begins with the start token, and ends with the end token, with which it is padded too.
    """
    place = np.arange(tokens_BT.shape[1])
    empty = jnp.where(place == 0, tokens_BT[:, :1], tokens_BT[:, -1:])
    return empty, jnp.broadcast_to(place < 2, empty.shape)


def guided_text(tokens: Array, mask: Array, negative: tuple[Array, Array] | None) -> tuple[Array, Array]:
    """(tokens, mask) of 2 x batch, as guidance wants them: first those to follow, then `negative`'s or the empty text's."""
    return tuple(jnp.concatenate(pair) for pair in zip((tokens, mask), negative or no_text(tokens), strict=True))


def drop_text(batch: Batch, dropped_B: Bool[Array, "batch"]) -> tuple[Array, Array]:
    """(tokens, mask) of a batch, the empty text where `dropped_B`."""
    tokens, mask = no_text(batch["tokens"])
    choose = lambda empty, text: jnp.where(dropped_B[:, None], empty, text)  # noqa: E731
    return choose(tokens, batch["tokens"]), choose(mask, batch["mask"].astype(bool))
