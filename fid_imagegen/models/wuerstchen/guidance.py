"""A guidance scale as an input of a network (Meng et al. 2023, arXiv 2210.03142)."""

import flax.linen as nn
from jaxtyping import Array, Float

from fid_imagegen.models.layers import sin_cos_levels

WIDTH = 128


class GuidanceEmbedding(nn.Module):
    """Scale -> features, to be added to what the network is conditioned on.

    The authors add it to the level's embedding. Beside the condition it is part of what is computed once an image, and the
    network stays as it is; zero at first, so that a student starts as its teacher.
    """

    features: int

    @nn.compact
    def __call__(self, scale_B: Float[Array, "batch"]) -> Float[Array, "batch features"]:
        hidden = nn.silu(nn.Dense(WIDTH)(sin_cos_levels(scale_B[:, None], WIDTH)[:, 0]))
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros)(hidden)
