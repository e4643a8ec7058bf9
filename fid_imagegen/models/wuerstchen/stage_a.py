"""Stage A: Paella's VQGAN, 4x4 pixels to 4 channels (Würstchen, arXiv 2306.00637, App. E.1; Paella, arXiv 2211.07292).

The released weights and their code differ from the text: 192 and 384 channels, not 384 everywhere, and 12 blocks, not 16.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from fid_imagegen.models.layers import XAVIER, layer_norm, stack
from fid_imagegen.models.wuerstchen.depthwise import DepthwiseConv

MAP = ("batch", None, None, "features")
IMAGE = ("NHWC", "HWIO", "NHWC")
# PyTorch's own initialisation of convolutions, U(-1/sqrt(fan in), 1/sqrt(fan in)), which the authors kept outside of blocks.
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MixingBlock(nn.Module):
    """x += g2 depthwise(LN(x)(1 + g0) + g1), then x += g5 MLP(LN(x)(1 + g3) + g4).

    The six scalars g are zero at initialisation, where the block is the identity.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width channels"], None]:
        channels = x.shape[-1]
        g = self.param("gammas", nn.initializers.zeros, (6,)).astype(self.dtype)
        h = layer_norm("norm_depthwise", affine=False, dtype=self.dtype)(x) * (1 + g[0]) + g[1]
        x = x + g[2] * DepthwiseConv(padding="edge", dtype=self.dtype, name="depthwise")(h)
        h = layer_norm("norm_mlp", affine=False, dtype=self.dtype)(x) * (1 + g[3]) + g[4]
        h = nn.gelu(nn.Dense(4 * channels, kernel_init=XAVIER, dtype=self.dtype, name="up")(h), approximate=False)
        h = nn.with_logical_constraint(h, ("batch", None, None, "hidden"))
        x = x + g[5] * nn.Dense(channels, kernel_init=XAVIER, dtype=self.dtype, name="down")(h)
        return nn.with_logical_constraint(x, MAP), None


class DoublingConv(nn.Module):
    """Transposed 4x4 convolution of stride 2 to twice the size; kernel [4, 4, features, channels] and bias.

    On CPU the gradient of XLA's for the kernel is slow (144 ms against 10 at one shape): there it is four 2x2 convolutions.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        kernel = self.param("kernel", UNIFORM, (4, 4, self.features, x.shape[-1])).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        double = double_by_parity if jax.default_backend() == "cpu" else double_by_transpose
        return double(x.astype(self.dtype), kernel) + bias


def double_by_transpose(x: Array, kernel: Array) -> Array:
    """XLA's transposed convolution; PyTorch's with padding 1."""
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=IMAGE, transpose_kernel=True)


def double_by_parity(x: Array, kernel: Array) -> Array:
    """The same: output rows of one parity see two input rows through every other row of the kernel, and so do columns."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = rearrange(kernel, "(u i) (v j) o c -> i j u v c o", i=2, j=2)[:, :, ::-1, ::-1]

    def part(row, column):
        seen = x[:, row : row + height + 1, column : column + width + 1]
        return jax.lax.conv_general_dilated(seen, taps[1 - row, 1 - column], (1, 1), "VALID", dimension_numbers=IMAGE)

    parts = [[part(row, column) for column in (0, 1)] for row in (0, 1)]
    return rearrange(jnp.asarray(parts), "i j b h w c -> b (h i) (w j) c")


class PaellaVQ(nn.Module):
    """Encoder, quantiser and decoder. Images are in [0, 1], latents at 1 / `stride` of their size, about unit variance.

    Stages B and C see the latents before quantisation, divided by 0.3764: the quantiser only shapes them in training.
    `remat` and `unroll` are those of `layers.stack`, for the decoder's equal blocks.
    """

    levels: tuple[int, ...] = (192, 384)  # channels, from the finest
    bottleneck_blocks: int = 12
    latent_channels: int = 4
    codebook_size: int = 8192
    image_channels: int = 3
    patch: int = 2
    remat: bool = False
    unroll: bool = False
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels per latent position, along each side."""
        return self.patch * 2 ** (len(self.levels) - 1)

    def setup(self):
        fields = {"kernel_init": UNIFORM, "dtype": self.dtype}
        finest, *coarser = self.levels
        *finer, coarsest = self.levels
        self.patch_in = nn.Conv(finest, (1, 1), **fields)
        self.down_convs = [nn.Conv(width, (4, 4), 2, padding=1, **fields) for width in coarser]
        self.down_blocks = [MixingBlock(self.dtype) for _ in self.levels]
        self.to_latents = nn.Conv(self.latent_channels, (1, 1), use_bias=False, **fields)
        self.latent_norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5)
        # The authors draw +-1/size, all but one point beside latents of unit variance: few codes would ever be nearest.
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.codebook_size, self.latent_channels))
        self.from_latents = nn.Conv(coarsest, (1, 1), **fields)
        self.bottleneck = stack(
            MixingBlock, self.bottleneck_blocks, remat=self.remat, unroll=self.unroll, dtype=self.dtype
        )
        self.up_convs = [DoublingConv(width, self.dtype) for width in finer[::-1]]
        self.up_blocks = [MixingBlock(self.dtype) for _ in finer]
        self.patch_out = nn.Conv(self.image_channels * self.patch**2, (1, 1), **fields)

    def encode(
        self, images_BHWC: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns latents"]:
        """Latents before quantisation. With `train` the BatchNorm takes the batch's statistics and tracks them.

        Raises ValueError unless height and width are multiples of `stride`.
        """
        if images_BHWC.shape[1] % self.stride or images_BHWC.shape[2] % self.stride:
            raise ValueError(
                f"found images {images_BHWC.shape}, expected sides that are multiples of {self.stride}; pad or crop them"
            )
        x = rearrange(images_BHWC, "b (h i) (w j) c -> b h w (c i j)", i=self.patch, j=self.patch)
        x = self.patch_in(x.astype(self.dtype))
        for level, block in enumerate(self.down_blocks):
            x, _ = block(self.down_convs[level - 1](x) if level else x)
        return self.latent_norm(self.to_latents(x).astype(jnp.float32), use_running_average=not train)

    def quantise(
        self, latents_BHWC: Float[Array, "batch rows columns latents"]
    ) -> tuple[
        Float[Array, "batch rows columns latents"],
        Int[Array, "batch rows columns"],
        Float[Array, ""],
        Float[Array, ""],
    ]:
        """(the nearest codes, their indices, codebook loss, commitment loss), gradients passed straight through to latents.

        The losses of VQ-VAE (arXiv 1711.00937, eq. 3) without weights: the authors weigh commitment by 0.25.
        """
        # A channel at a time: exact on every backend, and fused into the argmin instead of stored for every pair.
        pairs = zip(jnp.moveaxis(latents_BHWC, -1, 0), self.codebook.T, strict=True)
        indices = jnp.argmin(sum(jnp.square(z_BHW[..., None] - code_K) for z_BHW, code_K in pairs), axis=-1)
        codes_BHWC = self.codebook[indices]
        stop = jax.lax.stop_gradient
        codebook_loss = jnp.mean(jnp.square(codes_BHWC - stop(latents_BHWC)))
        commitment_loss = jnp.mean(jnp.square(stop(codes_BHWC) - latents_BHWC))
        return latents_BHWC + stop(codes_BHWC - latents_BHWC), indices, codebook_loss, commitment_loss

    def decode(
        self, latents_BHWC: Float[Array, "batch rows columns latents"]
    ) -> Float[Array, "batch height width channels"]:
        """Images, float32, not clipped to [0, 1], of quantised latents or of those `encode` gives."""
        x, _ = self.bottleneck(self.from_latents(latents_BHWC.astype(self.dtype)))
        for enlarge, block in zip(self.up_convs, self.up_blocks, strict=True):
            x, _ = block(enlarge(x))
        x = self.patch_out(x).astype(jnp.float32)
        return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=self.patch, j=self.patch)

    def __call__(
        self, images_BHWC: Float[Array, "batch height width channels"], train: bool
    ) -> tuple[Float[Array, "batch height width channels"], Float[Array, ""], Float[Array, ""]]:
        """(images through the quantiser, codebook loss, commitment loss)."""
        codes_BHWC, _, codebook_loss, commitment_loss = self.quantise(self.encode(images_BHWC, train))
        return self.decode(codes_BHWC), codebook_loss, commitment_loss


class Discriminator(nn.Module):
    """Patch discriminator of Stage A: strided convolutions under spectral normalisation, InstanceNorm from the second on.

    With `train` each call takes a step of the power iterations, kept in the collection "batch_stats".
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512, 512)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images_BHWC: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns"]:
        """Logits (positive: real), one for each 2^len(widths) pixels square; the authors' head ends in their sigmoid."""
        stride = 2 ** len(self.widths)
        if max(images_BHWC.shape[1:3]) <= stride:
            raise ValueError(
                f"found images {images_BHWC.shape}, expected a side above {stride}: InstanceNorm makes a single position "
                "zero; enlarge the crops or take fewer widths"
            )
        x = images_BHWC.astype(self.dtype)
        for index, width in enumerate(self.widths):
            convolution = nn.Conv(
                width, (3, 3), 2, padding=1, kernel_init=UNIFORM, dtype=self.dtype, name=f"conv_{index}"
            )
            x = nn.SpectralNorm(convolution, dtype=self.dtype, name=f"spectral_{index}")(x, update_stats=train)
            if index:
                x = nn.InstanceNorm(epsilon=1e-5, use_bias=False, use_scale=False, dtype=self.dtype)(x)
            x = nn.with_logical_constraint(nn.leaky_relu(x, 0.2), MAP)
        return nn.Conv(1, (1, 1), kernel_init=UNIFORM, name="head")(x)[..., 0]
