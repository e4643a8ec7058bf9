"""The convolutional trunk of VGG16 (Simonyan & Zisserman 2015, arXiv 1409.1556, configuration D)."""

import flax.linen as nn
from jaxtyping import Array, Float

# Channels and 3x3 convolutions of each stage; a 2x2 max-pool stands between stages.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """Activations relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, at strides 1, 2, 4, 8 and 16.

    Input: NHWC RGB under the normalisation the weights were trained with (LPIPS applies its own); H and W at least 16.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> list[Float[Array, "batch h w channels"]]:
        if min(images.shape[1:3]) < 16:
            raise ValueError(f"found images {images.shape}, expected sides of at least 16 for VGG16; resize them first")
        x, activations = images, []
        for stage, (channels, convolutions) in enumerate(STAGES, start=1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for index in range(1, convolutions + 1):
                # Padding 1 on each side as in torchvision, so that odd sizes agree too.
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, name=f"conv{stage}_{index}")(x))
            activations.append(x)
        return activations
