"""Our generators as one would write them in PyTorch: the peers of `benchmarks/throughput.py`.

A twin takes what our network takes, [batch, height, width, channels] and one level an image, and returns the same values for the
same parameters (`tests/test_throughput.py`). Names follow our tree where PyTorch's habits do not differ: they do in one matrix
for queries, keys and values, and in modules where we stack layers. ADM's twin is diffusers'.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import Tensor, nn
from torch.nn import functional as F

from fid_imagegen.interop import unet
from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.dit import DiT, column_row_positions
from fid_imagegen.models.function_generator import FunctionGenerator
from fid_imagegen.models.layers import BlockStyle, sin_cos_positions
from fid_imagegen.models.pixel_function import PixelMLP
from fid_imagegen.models.unets.adm import ADM
from fid_imagegen.models.uvit import UViT

STACKED = ("blocks", "encoder", "decoder")  # names of layers that lie in one array
JOINED = {"query": "query_key_value", "key": "query_key_value", "value": "query_key_value"}
JOINED_ACROSS = {"query": "query", "key": "key_value", "value": "key_value"}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
RENAMED = (
    (r"^patches\.project", "patches"),
    (r"\bkernel_", "kernels."),
    (r"\bbias_", "biases."),
    (r"\bhead_norm_", "norms."),
    (r"\bhead_", "heads."),
)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[batch, height, width, channels] -> [batch, tokens, features]."""
    x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def sin_cos_levels(level_B: Tensor, features: int) -> Tensor:
    """[batch, features]."""
    half = features // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=level_B.device) / half)
    phases = level_B[:, None] * frequencies
    return torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[batch, tokens, features] each."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, bias: bool):
        super().__init__()
        self.heads = heads
        self.query_key_value, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.query_key_value(x).chunk(3, dim=-1), self.heads))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.out(attend(self.query(x), *self.key_value(context).chunk(2, dim=-1), self.heads))


class FeedForward(nn.Module):
    def __init__(self, width: int, gelu: str = "tanh"):
        super().__init__()
        self.gelu, self.up, self.down = gelu, nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


class LevelEmbedding(nn.Module):
    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale, self.Dense_0, self.Dense_1 = scale, nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, level_B: Tensor) -> Tensor:
        return self.Dense_1(F.silu(self.Dense_0(sin_cos_levels(self.scale * level_B, 256))))


class AdaLNZeroBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = SelfAttention(width, heads, bias=True), FeedForward(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(condition))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class FeatureExtractor(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, level_scale: float):
        super().__init__()
        self.level = LevelEmbedding(width, level_scale)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.level(level_B)
        for block in self.blocks:
            x = block(x, condition)
        return x, condition


class DiTTwin(nn.Module):
    def __init__(self, model: DiT, image_size: int):
        super().__init__()
        self.patch, self.rows = model.patch, image_size // model.patch
        features = model.patch**2 * model.channels
        self.patches = nn.Linear(features, model.width)
        positions = column_row_positions(self.rows, self.rows, model.width)
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        self.extractor = FeatureExtractor(model.width, model.heads, model.depth, model.level_scale)
        self.modulation = nn.Linear(model.width, 2 * model.width)
        self.norm = nn.LayerNorm(model.width, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(model.width, features)

    def forward(self, x: Tensor, level_B: Tensor, coords: Tensor | None = None) -> Tensor:
        x, condition = self.extractor(self.patches(patchify(x, self.patch)) + self.positions, level_B)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return unpatchify(self.head(self.norm(x) * (1 + scale) + shift), self.patch, self.rows)


class UViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, skip: bool):
        super().__init__()
        self.join = nn.Linear(2 * width, width) if skip else None
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = SelfAttention(width, heads, bias=False), FeedForward(width, "none")

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class UViTTwin(nn.Module):
    def __init__(self, model: UViT, image_size: int):
        super().__init__()
        self.patch, self.rows, self.level_scale = model.patch, image_size // model.patch, model.level_scale
        width, heads, half = model.width, model.heads, model.depth // 2
        self.patches = nn.Linear(model.patch**2 * model.channels, width)
        self.positions = nn.Parameter(torch.zeros(1 + self.rows**2, width))
        self.encoder = nn.ModuleList(UViTBlock(width, heads, skip=False) for _ in range(half + 1))  # and the middle
        self.decoder = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(half))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, model.patch**2 * model.channels)
        self.smooth = nn.Conv2d(model.channels, model.channels, 3, padding=1)

    def forward(self, x: Tensor, level_B: Tensor, coords: Tensor | None = None) -> Tensor:
        tokens = self.patches(patchify(x, self.patch))
        level = sin_cos_levels(self.level_scale * level_B, self.positions.shape[1])[:, None]
        x, skips = torch.cat([level.to(tokens.dtype), tokens], dim=1) + self.positions, []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = block(x, skips.pop())
        x = unpatchify(self.head(self.norm(x[:, 1:])), self.patch, self.rows)
        return self.smooth(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.self_attention, self.cross_attention = (
            SelfAttention(width, heads, bias=False),
            CrossAttention(width, heads),
        )
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attention(self.norm_self(x))
        x = x + self.cross_attention(self.norm_cross(x), context)
        return x + self.mlp(self.norm_mlp(x))


class FunctionPredictor(nn.Module):
    """[batch, tokens, features] -> the predicted columns of every layer, [batch, fan-in, groups]."""

    def __init__(self, kind: CoordinateMLP, width: int, heads: int, depth: int):
        super().__init__()
        self.columns = kind.columns
        self.weight_tokens = nn.Parameter(torch.randn(sum(kind.columns), width))
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in kind.columns)
        self.heads = nn.ModuleList(nn.Linear(width, fan_in) for fan_in, _ in kind.layer_sizes)

    def forward(self, features: Tensor) -> list[Tensor]:
        x, context = self.weight_tokens.expand(features.shape[0], -1, -1), self.norm_context(features)
        for block in self.blocks:
            x = block(x, context)
        layers = zip(self.heads, self.norms, x.split(self.columns, dim=1), strict=True)
        return [head(norm(own)).transpose(1, 2) for head, norm, own in layers]


class ImageFunction(nn.Module):
    """The coordinate MLPs of a batch: predicted columns and coordinates [N, 2] -> [batch, N, channels]."""

    def __init__(self, kind: CoordinateMLP):
        super().__init__()
        if (kind.activation, kind.integrated) != ("relu", False) or kind.weight_update == "low_rank":
            raise ValueError(
                f"found {kind}, expected a ReLU function of updates 'normalize' or 'scale': its twin is none other"
            )
        self.kind = kind
        self.kernels = nn.ParameterList(torch.empty(sizes) for sizes in kind.layer_sizes)
        self.biases = nn.ParameterList(torch.empty(fan_out) for _, fan_out in kind.layer_sizes)
        self.gain = nn.Parameter(torch.empty(kind.channels))
        self.register_buffer("frequencies", torch.from_numpy(np.float32(kind.frequencies)), persistent=False)

    def matrix(self, base: Tensor, columns: Tensor) -> Tensor:
        """[batch, fan-in, fan-out]."""
        grouped = base.unflatten(1, (-1, columns.shape[2]))
        if self.kind.weight_update == "scale":
            return (grouped * (1 + columns[:, :, None])).flatten(2)
        return F.normalize((grouped * columns[:, :, None]).flatten(2), dim=1)

    def forward(self, predicted: list[Tensor], coords: Tensor) -> Tensor:
        phases = (math.pi * coords[:, :, None] * self.frequencies).flatten(1)
        x = torch.cat([torch.cos(phases), torch.sin(phases)], dim=1).expand(predicted[0].shape[0], -1, -1)
        for layer, (base, bias, columns) in enumerate(zip(self.kernels, self.biases, predicted, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if layer else x, self.matrix(base, columns))
        return x * self.gain


class PixelPredictor(nn.Module):
    """[batch, tokens, features] and the condition -> features of all pixels, [batch, size, size, values]."""

    def __init__(self, kind: PixelMLP, width: int, heads: int, depth: int):
        super().__init__()
        self.patch, self.rows = kind.patch, kind.rows
        self.blocks = nn.ModuleList(AdaLNZeroBlock(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(width, kind.features)
        self.join = nn.Conv2d(kind.values, kind.values, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = unpatchify(self.head(self.norm(x) * (1 + scale) + shift), self.patch, self.rows)
        return x + self.join(F.gelu(x, approximate="tanh").permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PixelFunction(nn.Module):
    """Features of pixels [..., values] -> colours [..., channels]: functions of pixels on their own grid."""

    def __init__(self, kind: PixelMLP):
        super().__init__()
        sizes = (kind.values, kind.width), (kind.width, kind.channels)
        self.kernels = nn.ParameterList(torch.empty(size) for size in sizes)
        self.biases = nn.ParameterList(torch.empty(fan_out) for _, fan_out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.kernels[0] + self.biases[0], approximate="tanh")
        return x[..., : self.biases[1].numel()] + hidden @ self.kernels[1] + self.biases[1]


class GeneratorTwin(nn.Module):
    """Patches, positions and the extractor, of every kind of function."""

    def __init__(self, model: FunctionGenerator, image_size: int):
        super().__init__()
        self.patch, self.rows = model.patch, image_size // model.patch
        self.patches = nn.Linear(model.patch**2 * model.kind.channels, model.width)
        positions = sin_cos_positions(self.rows, self.rows, model.width)
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        self.extractor = FeatureExtractor(model.width, model.heads, model.extractor_depth, model.level_scale)

    def extracted(self, x: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        """Features of patches, and the condition."""
        return self.extractor(self.patches(patchify(x, self.patch)) + self.positions, level_B)


class FunctionTwin(GeneratorTwin):
    def __init__(self, model: FunctionGenerator, image_size: int):
        super().__init__(model, image_size)
        self.predictor = FunctionPredictor(model.kind, model.width, model.heads, model.predictor_depth)
        self.function = ImageFunction(model.kind)

    def forward(self, x: Tensor, level_B: Tensor, coords: Tensor) -> Tensor:
        features, _ = self.extracted(x, level_B)
        return self.function(self.predictor(features), coords).unflatten(1, (x.shape[1], -1))


class PixelTwin(GeneratorTwin):
    def __init__(self, model: FunctionGenerator, image_size: int):
        super().__init__(model, image_size)
        self.predictor = PixelPredictor(model.kind, model.width, model.heads, model.predictor_depth)
        self.function = PixelFunction(model.kind)

    def forward(self, x: Tensor, level_B: Tensor, coords: Tensor | None = None) -> Tensor:
        return self.function(self.predictor(*self.extracted(x, level_B)))


class ADMTwin(nn.Module):
    def __init__(self, model: ADM, image_size: int):
        from diffusers import UNet2DModel

        super().__init__()
        self.level_scale = model.level_scale
        # oneDNN's and cuDNN's convolutions are quickest on channels that lie last.
        self.unet = UNet2DModel(**unet.diffusers_config(model)).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, level_B: Tensor, coords: Tensor | None = None) -> Tensor:
        return self.unet(x.permute(0, 3, 1, 2), self.level_scale * level_B).sample.permute(0, 2, 3, 1)


# By the network, that of functions by their kind.
TWINS = {DiT: DiTTwin, UViT: UViTTwin, CoordinateMLP: FunctionTwin, PixelMLP: PixelTwin, ADM: ADMTwin}


def make_twin(model: Any, params: Mapping, image_size: int) -> nn.Module:
    """The twin of a network without labels, with its parameters, for square images. ValueError for a style it has not."""
    made = type(model.kind if isinstance(model, FunctionGenerator) else model)
    if made not in TWINS:
        raise ValueError(f"found {made.__name__}, expected one of {sorted(kind.__name__ for kind in TWINS)}")
    if model.num_classes or getattr(model, "style", BlockStyle()) != BlockStyle():
        raise ValueError(f"found {model}, expected no classes and DiT's own blocks: the twins have no others")
    twin = TWINS[made](model, image_size)
    twin.load_state_dict(twin_state(model, params), strict=True)
    return twin


def twin_state(model: Any, params: Mapping) -> dict[str, Tensor]:
    """Our parameters, or a tree like theirs, by the names and in the layouts of the twin."""
    if isinstance(model, ADM):
        return {f"unet.{name}": torch.from_numpy(leaf.copy()) for name, leaf in unet.to_state_dict(params).items()}
    parts = defaultdict(dict)
    for (*modules, last), leaf in _by_layer(params):
        if last == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        part = modules[-1] if modules and modules[-1] in JOINED else ""
        if part:
            modules[-1] = (JOINED_ACROSS if modules[-2] == "cross_attention" else JOINED)[part]
        name = ".".join([*modules, LEAVES.get(last, last)])
        for pattern, there in RENAMED:
            name = re.sub(pattern, there, name)
        parts[name][part] = leaf
    order = [*JOINED, ""]
    joined = {name: [each[part] for part in sorted(each, key=order.index)] for name, each in parts.items()}
    return {name: torch.from_numpy(np.concatenate(leaves)) for name, leaves in joined.items()}


def _by_layer(params: Mapping) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Paths and arrays, those of stacked layers one by one."""
    for path, leaf in flatten_dict(params).items():
        leaf, stack = np.asarray(leaf), next((i for i, name in enumerate(path, 1) if name in STACKED), 0)
        if stack:
            yield from (((*path[:stack], str(layer), *path[stack:]), each) for layer, each in enumerate(leaf))
        else:
            yield path, leaf
