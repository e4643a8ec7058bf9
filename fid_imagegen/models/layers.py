"""Layers the Transformers share: patches, attention, adaLN-Zero and decoder blocks, their embeddings, and DiT's trunk.

DiT (Peebles & Xie 2023, arXiv 2212.09748) is the source of the adaLN-Zero block; TransINR (arXiv 2208.02801) and ANR
(arXiv 2407.15355) of the decoder block. Axes are named with `nn.with_logical_constraint`; `parallel` supplies the rules,
and without a mesh the names do nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from fid_imagegen.models.products import Dense, attend
from fid_imagegen.models.rotary import Rotation, rotary_angles, rotate

Dtype = Any
TOKENS = ("batch", "tokens", "features")
XAVIER = nn.initializers.xavier_uniform()


def wide(dtype: Dtype) -> Dtype:
    """float32, or float64 where that is computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def layer_norm(name: str | None = None, *, affine: bool, dtype: Dtype) -> nn.LayerNorm:
    """Layer normalisation over features with DiT's epsilon; `affine=False` where a modulation follows."""
    return nn.LayerNorm(epsilon=1e-6, use_bias=affine, use_scale=affine, dtype=dtype, name=name)


def rms_norm(name: str | None = None, *, affine: bool, dtype: Dtype) -> nn.RMSNorm:
    """Features over their root mean square, neither centred nor shifted (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return nn.RMSNorm(epsilon=1e-6, use_scale=affine, dtype=dtype, name=name)


def sin_cos_positions(height: int, width: int, features: int) -> np.ndarray:
    """Fixed 2-D sin-cos position embedding, float32 [height * width, features]; `features` must divide by 4.

    The first half of the features encodes the row, the second the column, each as [sin, cos] of position / 10000^(k/n).
    """
    if features % 4:
        raise ValueError(
            f"found {features} features, expected a multiple of 4 for 2-D sin-cos; change the model's width"
        )
    frequencies = 1.0 / 10000 ** (np.arange(features // 4, dtype=np.float64) / (features // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def encode(position):
        phases = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(phases), np.cos(phases)], axis=1)

    return np.concatenate([encode(rows), encode(columns)], axis=1).astype(np.float32)


def check_image(x_BHWC: Array, channels: int, patch: int) -> None:
    """ValueError for images of other channels, or of sides that `patch` does not divide."""
    height, width, found = x_BHWC.shape[1:]
    if found != channels:
        raise ValueError(f"found images of {found} channels, expected {channels}; change the model's channels")
    if height % patch or width % patch:
        raise ValueError(
            f"found images of {height}x{width}, expected multiples of the patch, {patch}; resize them or change the model's patch"
        )


def check_labels(label_B: Array | None, last: int) -> None:
    """ValueError where a model of labels 0..`last` is called without labels."""
    if label_B is None:
        raise ValueError(
            f"found no labels, expected one of 0..{last} an image; give label_B, or make the model with num_classes=0"
        )


def patchify(x_BHWC: Float[Array, "batch height width channels"], patch: int) -> Float[Array, "batch tokens features"]:
    """Images -> non-overlapping patches in row-major order, each flattened as (row, column, channel)."""
    return rearrange(x_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(
    x: Float[Array, "batch tokens features"], patch: int, rows: int
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patchify` for images of `rows` rows of patches."""
    return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=patch, q=patch)


def sin_cos_levels(levels_BK: Float[Array, "batch K"], features: int) -> Float[Array, "batch K features"]:
    """[cos, sin] of the levels at features / 2 frequencies from 1 to almost 1e-4; at least float32, for phases are large."""
    half = features // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    phases = levels_BK.astype(wide(levels_BK.dtype))[..., None] * frequencies
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)


class LevelEmbedding(nn.Module):
    """Noise level, or two of a jump -> features: sin-cos of `scale * level` (period 10,000, 256 wide each), Dense, SiLU, Dense.

    `scale` is 1000 as in the torch release of consistency models: c_noise = ln(sigma) / 4 spans only [-1.6, 1.1], and the
    embedder was made for 0..1000. Objectives that differentiate in the level need a small scale.
    """

    features: int
    scale: float = 1000.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, levels_BK: Float[Array, "batch K"]) -> Float[Array, "batch features"]:
        x = sin_cos_levels(self.scale * levels_BK.astype(wide(levels_BK.dtype)), 256).astype(self.dtype)
        x = rearrange(x, "b k f -> b (k f)")
        normal = nn.initializers.normal(0.02)
        x = nn.silu(Dense(self.features, kernel_init=normal, dtype=self.dtype)(x))
        return Dense(self.features, kernel_init=normal, dtype=self.dtype)(x)


class Attention(nn.Module):
    """Multi-head attention of `queries` over `context` (`products.attend`).

    qk_norm: RMS norms on the queries and keys of every head (Dehghani et al. 2023, arXiv 2302.05442), so that logits cannot
    grow with the weights; continuous-time objectives need them to stay finite.
    angles: of tokens that attend to themselves and lie on a grid; their queries and keys are turned by them, after the norms.
    """

    heads: int
    use_bias: bool
    qk_norm: bool = False
    kernel_init: nn.initializers.Initializer = XAVIER
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "batch queries features"],
        context: Float[Array, "batch keys features"],
        angles: Rotation | None = None,
    ) -> Float[Array, "batch queries features"]:
        features = queries.shape[-1]
        if features % self.heads:
            raise ValueError(
                f"found width {features} with {self.heads} heads, expected a multiple; change width or heads"
            )

        def project(name, x):
            dense = Dense(features, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype, name=name)
            x = rearrange(dense(x), "b n (h d) -> b n h d", h=self.heads)
            return nn.with_logical_constraint(x, ("batch", "tokens", "heads", None))

        q, k, v = project("query", queries), project("key", context), project("value", context)
        if self.qk_norm:
            q, k = (
                rms_norm(name, affine=True, dtype=self.dtype)(x) for name, x in (("query_norm", q), ("key_norm", k))
            )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = rearrange(attend(q, k, v), "b n h d -> b n (h d)")
        return Dense(features, kernel_init=self.kernel_init, dtype=self.dtype, name="out")(out)


class FeedForward(nn.Module):
    """Dense to four times the width, GELU (DiT's tanh form unless `exact`), Dense back."""

    dtype: Dtype = jnp.float32
    exact: bool = False
    kernel_init: nn.initializers.Initializer = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        hidden = Dense(4 * x.shape[-1], kernel_init=self.kernel_init, dtype=self.dtype, name="up")(x)
        hidden = nn.with_logical_constraint(nn.gelu(hidden, approximate=not self.exact), ("batch", "tokens", "hidden"))
        return Dense(x.shape[-1], kernel_init=self.kernel_init, dtype=self.dtype, name="down")(hidden)


class SwiGLU(nn.Module):
    """(SiLU(x W) * x V) W2 without biases (Shazeer 2020, arXiv 2002.05202, eq. 6): `gate`, `up` and `down`.

    Three kernels of 8/3 of the width have as many parameters as FeedForward's two of 4, up to the rounding of `hidden`.
    """

    dtype: Dtype = jnp.float32

    @staticmethod
    def hidden(features: int) -> int:
        """8/3 of the width, rounded up to a multiple of 8, or of 64 from a width of 512: tiles and meshes divide it."""
        multiple = 64 if features >= 512 else 8
        return multiple * math.ceil(8 * features / (3 * multiple))

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        def dense(features, name):
            return Dense(features, use_bias=False, kernel_init=XAVIER, dtype=self.dtype, name=name)

        width = self.hidden(x.shape[-1])
        hidden = nn.silu(dense(width, "gate")(x)) * dense(width, "up")(x)
        return dense(x.shape[-1], "down")(nn.with_logical_constraint(hidden, ("batch", "tokens", "hidden")))


NORMS = {"layer": layer_norm, "rms": rms_norm}
MLPS = {"gelu": FeedForward, "swiglu": SwiGLU}


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What a trunk's blocks and the norms around them are made of: four independent choices, by default DiT's.

    norm: of NORMS. mlp: of MLPS. qk_norm: `Attention`'s, in AdaLNZeroBlocks alone.
    rotary: the queries and keys of tokens that lie on a grid are turned by their places where they attend to each other; fixed
    positions stay, for rotations know distances and no places (`rotary`).
    """

    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    rotary: bool = False

    def __post_init__(self):
        for field, known in (("norm", NORMS), ("mlp", MLPS)):
            if (found := getattr(self, field)) not in known:
                raise ValueError(
                    f"found {field} {found!r}, expected one of {sorted(known)}; change config.model.{field}"
                )

    def angles(self, rows: int, columns: int, features: int) -> Rotation | None:
        """Those by which a grid's tokens are turned in heads of so many features; None if they are not."""
        return rotary_angles(rows, columns, features) if self.rotary else None


def modulated_norm(
    x: Float[Array, "batch tokens features"], condition: Float[Array, "batch features"], norm: str, dtype: Dtype
) -> Float[Array, "batch tokens features"]:
    """DiT's norm before its head, shifted and scaled by the condition; its `modulation` is the calling compact method's."""
    zeros = nn.initializers.zeros
    modulation = Dense(2 * x.shape[-1], kernel_init=zeros, dtype=dtype, name="modulation")(nn.silu(condition))
    shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
    return NORMS[norm]("norm", affine=False, dtype=wide(dtype))(x) * (1 + scale) + shift


class AdaLNZeroBlock(nn.Module):
    """DiT block: attention and MLP branches, shifted, scaled and gated by the condition; the identity at initialisation."""

    heads: int
    dropout: float = 0.0
    style: BlockStyle = BlockStyle()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens features"],
        condition: Float[Array, "batch features"],
        deterministic: bool,
        angles: Rotation | None = None,
    ) -> tuple[Float[Array, "batch tokens features"], None]:
        zeros, norm, mlp = nn.initializers.zeros, NORMS[self.style.norm], MLPS[self.style.mlp]
        modulation = Dense(6 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="modulation")(nn.silu(condition))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation[:, None], 6, axis=-1)
        h = norm("norm_attention", affine=False, dtype=self.dtype)(x) * (1 + scale_a) + shift_a
        attention = Attention(self.heads, use_bias=True, qk_norm=self.style.qk_norm, dtype=self.dtype, name="attention")
        x = x + gate_a * nn.Dropout(self.dropout)(attention(h, h, angles), deterministic)
        h = norm("norm_mlp", affine=False, dtype=self.dtype)(x) * (1 + scale_m) + shift_m
        h = mlp(dtype=self.dtype, name="mlp")(h)
        x = x + gate_m * nn.Dropout(self.dropout)(h, deterministic)
        return nn.with_logical_constraint(x, TOKENS), None


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: tokens attend to themselves, turned by `angles` if given, then to `context`, then an MLP."""

    heads: int
    style: BlockStyle = BlockStyle()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens features"],
        context: Float[Array, "batch keys features"],
        angles: Rotation | None = None,
    ) -> tuple[Float[Array, "batch tokens features"], None]:
        norm, mlp = NORMS[self.style.norm], MLPS[self.style.mlp]
        h = norm("norm_self", affine=True, dtype=self.dtype)(x)
        x = x + Attention(self.heads, use_bias=False, dtype=self.dtype, name="self_attention")(h, h, angles)
        h = norm("norm_cross", affine=True, dtype=self.dtype)(x)
        x = x + Attention(self.heads, use_bias=False, dtype=self.dtype, name="cross_attention")(h, context)
        h = norm("norm_mlp", affine=True, dtype=self.dtype)(x)
        x = x + mlp(dtype=self.dtype, name="mlp")(h)
        return nn.with_logical_constraint(x, TOKENS), None


def stack(
    block: Callable[..., nn.Module],
    layers: int,
    *,
    remat: bool,
    unroll: bool,
    static_argnums=(),
    in_axes=nn.broadcast,
    **kwargs,
):
    """`layers` copies of `block` under one `nn.scan`: parameters are stacked [L, ...] whether unrolled or not.

    in_axes: of the arguments after the carry; 0 for one that has an entry a layer.

    `unroll=True` compiles the layers one after another, which lets XLA fuse across them at the price of compile time;
    the parameter tree is the same, so checkpoints, sharding rules and converters never notice.
    """
    if remat:
        block = nn.remat(block, prevent_cse=False, static_argnums=static_argnums)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=layers,
        unroll=layers if unroll else 1,
    )
    return scanned(**kwargs)


class FeatureExtractor(nn.Module):
    """DiT blocks with adaLN-Zero, conditioned on the noise level and, where there are labels, on the label.

    grid: the tokens' rows and columns. Returns the tokens and the condition. One more label, `num_classes`, is the null class:
    that of no label.
    """

    width: int
    heads: int
    depth: int
    num_classes: int
    level_scale: float
    dropout: float
    remat: bool
    unroll: bool
    style: BlockStyle = BlockStyle()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens features"],
        levels_BK: Float[Array, "batch K"],
        label_B: Int[Array, "batch"] | None,
        deterministic: bool,
        grid: tuple[int, int],
    ) -> tuple[Float[Array, "batch tokens features"], Float[Array, "batch features"]]:
        condition = LevelEmbedding(self.width, self.level_scale, dtype=self.dtype, name="level")(levels_BK)
        if self.num_classes:
            check_labels(label_B, self.num_classes)
            embed = nn.Embed(
                self.num_classes + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="label"
            )
            condition = condition + embed(label_B).astype(self.dtype)
        blocks = stack(
            AdaLNZeroBlock,
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
            static_argnums=(3,),
            heads=self.heads,
            dropout=self.dropout,
            style=self.style,
            dtype=self.dtype,
            name="blocks",
        )
        angles = self.style.angles(*grid, self.width // self.heads)
        return blocks(tokens, condition, deterministic, angles)[0], condition
