"""CIFAR-10 ResNet-56 (He et al. 2016, arXiv 1512.03385, §4.2), a fixed classifier whose features serve as a metric."""

import flax.linen as nn
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

MEAN = (0.485, 0.456, 0.406)  # of images in [0, 1]: the public weights were trained with ImageNet's statistics
STD = (0.229, 0.224, 0.225)


class FrozenBatchNorm(nn.Module):
    """BatchNorm at inference. The statistics are parameters: the network is fixed, so there is one tree to carry."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
        shape = x.shape[-1:]
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        mean, var = self.param("mean", nn.initializers.zeros, shape), self.param("var", nn.initializers.ones, shape)
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def conv3x3(channels: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides=stride, padding=1, use_bias=False, name=name)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the option-A shortcut: every other pixel, new channels zero, half on each side."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h2 w2 channels2"]:
        y = nn.relu(FrozenBatchNorm(name="bn1")(conv3x3(self.channels, self.stride, "conv1")(x)))
        y = FrozenBatchNorm(name="bn2")(conv3x3(self.channels, 1, "conv2")(y))
        new = (self.channels - x.shape[-1]) // 2
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (new, new)))
        return nn.relu(y + shortcut)


class ResNet56(nn.Module):
    """Three stages of nine blocks (16, 32, 64 channels). Input: float RGB in [-1, 1], NHWC, trained on 32x32."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch 64"], Float[Array, "batch 10"]]:
        """The globally averaged features [B, 64] and the logits [B, 10], in CIFAR-10's order of classes."""
        x = ((images + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(STD)
        x = nn.relu(FrozenBatchNorm(name="bn1")(conv3x3(16, 1, "conv1")(x)))
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range(9):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(channels, stride, name=f"layer{stage}_{block}")(x)
        features = reduce(x, "b h w c -> b c", "mean")
        return features, nn.Dense(10, name="linear")(features)
