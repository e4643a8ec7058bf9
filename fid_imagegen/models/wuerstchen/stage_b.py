"""Stage B of Würstchen: latents of the semantic compressor (and text) -> latents of Stage A, as a U-shaped denoiser."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.core import FrozenDict
from jaxtyping import Array, Float

from fid_imagegen.models.layers import XAVIER
from fid_imagegen.models.wuerstchen.blocks import (
    LEVEL_SCALE,
    Image,
    check_channels,
    layer_norm,
    level_embedding,
    normal_init,
    single_block,
    stack_blocks,
    wide,
    xavier_init,
)
from fid_imagegen.models.wuerstchen.resize import resize

PUBLIC_STAGE_B = {
    "c_in": 4,
    "c_r": 64,
    "patch_size": 2,
    "c_cond": 1024,
    "c_hidden": (320, 640, 1280, 1280),
    "nhead": (-1, 10, 20, 20),
    "blocks": (4, 4, 14, 4),
    "level_config": ("CT", "CTA", "CTA", "CTA"),
    "inject_effnet": (False, True, True, True),
    "effnet_embd": 16,
    "clip_embd": 1024,
    "kernel_size": 3,
    "dropout": 0.1,
    "text": True,
}


class Upsample(nn.Module):
    """PyTorch's transposed convolution of kernel and stride 2: no two outputs share an input, so it is one product."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        # The authors' initialiser passes transposed convolutions over: PyTorch's own, but for the bias, which is zero here.
        init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        kernel = self.param("kernel", init, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jnp.einsum("bhwi,klio->bhkwlo", x.astype(self.dtype), kernel.astype(self.dtype))
        return rearrange(x, "b h k w l o -> b (h k) (w l) o") + bias.astype(self.dtype)


class Level(nn.Module):
    """The blocks of one resolution. With `skip` the first also sees the encoder's output and is kept apart from the stack."""

    layers: int
    skip: bool
    inject: int  # channels of the mapped compressor latents, 0: none
    remat: bool
    unroll: bool
    block: FrozenDict  # fields of Block

    def setup(self):
        if self.inject:
            self.effnet_mapper = nn.Dense(self.inject, kernel_init=normal_init, dtype=self.block["dtype"])
        if self.skip:
            self.first = single_block(remat=self.remat, **self.block)
        if rest := self.layers - self.skip:
            self.blocks = stack_blocks(rest, remat=self.remat, unroll=self.unroll, **self.block)

    def condition(self, effnet_BHWC: Image | None, text_BTD: Array | None, height: int, width: int) -> dict:
        """The compressor's latents at this size and the text's keys and values, None for what there is not."""
        cond = {"effnet": None, "first": None, "blocks": None}
        if self.inject:
            cond["effnet"] = self.effnet_mapper(resize(effnet_BHWC, height, width))
        if self.block["heads"] and self.block["text"]:
            if self.skip:
                cond["first"] = self.first.condition(None, text_BTD)[1]
            if self.layers > self.skip:
                cond["blocks"] = self.blocks.condition(None, text_BTD)[1]
        return cond

    def __call__(self, x: Image, embedding: Array, skip: Image | None, cond: dict, deterministic: bool) -> Image:
        effnet = cond["effnet"]
        if self.skip:
            joined = skip if effnet is None else jnp.concatenate([skip, effnet], axis=-1)
            x, _ = self.first(x, embedding, joined, cond["first"], deterministic)
        if self.layers > self.skip:
            x, _ = self.blocks(x, embedding, effnet, cond["blocks"], deterministic)
        return x


class StageB(nn.Module):
    """WuerstchenDiffNeXt; fields are named as in diffusers' config, and its `c_out` is `c_in`.

    The k-th entries of `c_hidden`, `nhead`, `blocks`, `level_config` ("CT", or "CTA" with attention) and `inject_effnet` are the
    k-th resolution's, the finest first. `text=False` leaves attention to the image alone.
    """

    c_in: int
    c_r: int
    patch_size: int
    c_cond: int
    c_hidden: tuple[int, ...]
    nhead: tuple[int, ...]
    blocks: tuple[int, ...]
    level_config: tuple[str, ...]
    inject_effnet: tuple[bool, ...]
    effnet_embd: int
    clip_embd: int
    kernel_size: int
    dropout: float
    text: bool
    level_scale: float = LEVEL_SCALE
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    @property
    def step(self) -> int:
        """The latents' height and width are multiples of it."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)

    def setup(self):
        self._check_fields()
        levels = range(len(self.c_hidden))
        if self.text:
            self.clip_mapper = nn.Dense(self.c_cond, kernel_init=normal_init, dtype=self.dtype)
        self.embedding = nn.Dense(self.c_hidden[0], kernel_init=xavier_init(0.02), dtype=self.dtype)
        self.down = [self._level(i, skip=False) for i in levels]
        self.up = [self._level(i, skip=i < len(levels) - 1) for i in reversed(levels)]
        self.downsample = [
            nn.Conv(width, (2, 2), (2, 2), padding="VALID", kernel_init=XAVIER, dtype=self.dtype)
            for width in self.c_hidden[1:]
        ]
        self.upsample = [Upsample(width, self.dtype) for width in reversed(self.c_hidden[:-1])]
        head = 2 * self.c_in * self.patch_size**2
        self.clf = nn.Dense(head, kernel_init=nn.initializers.zeros, dtype=wide(self.dtype))

    def condition(
        self,
        effnet_BHWC: Float[Array, "batch rows columns effnet_embd"] | None,
        text_BTD: Float[Array, "batch tokens clip_embd"] | None,
        latent_hw: tuple[int, int],
    ) -> dict:
        """All that does not depend on the noise level, for latents of `latent_hw`: {"down": one dict a level, "up": ...}.

        `effnet_BHWC`: latents of the semantic compressor at any size, None where no level takes them; `text_BTD`: the text
        encoder's tokens, None with `text=False`.
        """
        self._check_given("compressor latents", effnet_BHWC, any(self.inject_effnet), self.effnet_embd)
        self._check_given("text", text_BTD, self.text, self.clip_embd)
        self._check_size(latent_hw)
        text = layer_norm(self.clip_mapper(text_BTD)) if self.text else None

        def conditions(modules, exponents):
            scales = [self.patch_size * 2**exponent for exponent in exponents]
            return [
                module.condition(effnet_BHWC, text, latent_hw[0] // scale, latent_hw[1] // scale)
                for module, scale in zip(modules, scales, strict=True)
            ]

        levels = range(len(self.c_hidden))
        return {"down": conditions(self.down, levels), "up": conditions(self.up, reversed(levels))}

    def __call__(
        self, x_BHWC: Image, r_B: Float[Array, "batch"], cond: dict, deterministic: bool = True
    ) -> tuple[Image, Image]:
        """(a, b) in float32, each in the latents' shape, at noise times `r_B` in [0, 1]; b lies in (0.001, 0.999).

        The published noise estimate is (x - a) / b. At initialisation a is 0 and b is 1/2.
        """
        check_channels("latents", x_BHWC, self.c_in)
        self._check_size(x_BHWC.shape[1:3])
        embedding = level_embedding(r_B, self.c_r, self.level_scale)
        patches = rearrange(x_BHWC, "b (h p) (w q) c -> b h w (c p q)", p=self.patch_size, q=self.patch_size)
        h = layer_norm(self.embedding(patches))
        encoded = []
        for i, level in enumerate(self.down):
            h = self.downsample[i - 1](layer_norm(h)) if i else h
            h = level(h, embedding, None, cond["down"][i], deterministic)
            encoded.append(h)
        for i, level in enumerate(self.up):
            h = self.upsample[i - 1](layer_norm(h)) if i else h
            h = level(h, embedding, encoded[-1 - i], cond["up"][i], deterministic)
        h = self.clf(layer_norm(h.astype(wide(self.dtype))))
        h = rearrange(h, "b h w (c p q) -> b (h p) (w q) c", p=self.patch_size, q=self.patch_size)
        a, b = jnp.split(h, 2, axis=-1)
        return a, jax.nn.sigmoid(b) * (1 - 2e-3) + 1e-3

    def end_to_end(
        self,
        x_BHWC: Image,
        r_B: Float[Array, "batch"],
        effnet_BHWC: Image | None,
        text_BTD: Array | None,
        deterministic: bool = True,
    ) -> tuple[Image, Image]:
        """`condition` and `__call__` in one: what initialisation and training call."""
        return self(x_BHWC, r_B, self.condition(effnet_BHWC, text_BTD, x_BHWC.shape[1:3]), deterministic)

    def _level(self, i: int, *, skip: bool) -> Level:
        block = {
            "features": self.c_hidden[i],
            "heads": self.nhead[i] if "A" in self.level_config[i] else 0,
            "text": self.text,
            "kernel": self.kernel_size,
            "dropout": self.dropout,
            "gain": math.sqrt(1 / sum(self.blocks)),
            "dtype": self.dtype,
        }
        inject = self.c_cond if self.inject_effnet[i] else 0
        return Level(self.blocks[i], skip, inject, self.remat, self.unroll, FrozenDict(block))

    def _check_fields(self):
        lists = (self.c_hidden, self.nhead, self.blocks, self.level_config, self.inject_effnet)
        if len({len(entries) for entries in lists}) > 1 or min(self.blocks) < 1:
            raise ValueError(
                f"found c_hidden, nhead, blocks, level_config, inject_effnet = {lists}, expected one entry a level in each and "
                "at least one block a level; change the configuration"
            )
        if unknown := set(self.level_config) - {"CT", "CTA"}:
            raise ValueError(f"found level_config {sorted(unknown)}, expected 'CT' or 'CTA' for each level")

    def _check_given(self, what: str, x: Array | None, expected: bool, channels: int):
        if (x is not None) != expected:
            raise ValueError(
                f"found {'no ' if x is None else ''}{what}, expected {'some' if expected else 'none'} for this Stage B; "
                "change `text` or `inject_effnet`, or what is given"
            )
        if x is not None:
            check_channels(what, x, channels)

    def _check_size(self, latent_hw: tuple[int, int]):
        if latent_hw[0] % self.step or latent_hw[1] % self.step:
            raise ValueError(
                f"found latents of {latent_hw[0]}x{latent_hw[1]}, expected multiples of {self.step}; pad them, and crop the image"
            )
