"""LPIPS against a twin written with torch.nn.functional, on the same fully randomised weights."""

import jax
import numpy as np
import pytest

from fid_imagegen.interop.lpips import convert_lpips
from fid_imagegen.models.features.lpips import lpips_distance

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's numbering


def random_weights(rng):
    vgg16, position, channels = {}, 0, 3
    for layer in LAYERS:
        if layer != "M":
            scale = np.sqrt(2 / (9 * channels))
            vgg16[f"features.{position}.weight"] = rng.normal(0, scale, (layer, channels, 3, 3)).astype(np.float32)
            vgg16[f"features.{position}.bias"] = rng.normal(0, 0.1, layer).astype(np.float32)
            position, channels = position + 1, layer
        position += 1
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, c, 1, 1)).astype(np.float32) for i, c in enumerate(widths)}
    return vgg16, heads


def torch_lpips(vgg16, heads, a, b):
    functional = torch.nn.functional

    def activations(x):
        x = functional.interpolate(x, size=224, mode="bilinear", align_corners=False, antialias=False)
        shift, scale = (
            torch.tensor(c, dtype=x.dtype).view(1, 3, 1, 1) for c in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        x, taps = (x - shift) / scale, []
        position = 0
        for layer in LAYERS:
            if layer == "M":
                x = functional.max_pool2d(x, 2)
            else:
                weight, bias = (
                    torch.tensor(vgg16[f"features.{position}.{k}"], dtype=x.dtype) for k in ("weight", "bias")
                )
                x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
                position += 1
                if position in TAPS:
                    taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            position += 1
        return taps

    total = 0
    for i, (x, y) in enumerate(zip(activations(a), activations(b), strict=True)):
        head = torch.tensor(heads[f"lin{i}.model.1.weight"], dtype=x.dtype)
        total = total + functional.conv2d((x - y).square(), head).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distance_and_gradient_match_torch(dtype):
    """float32 is what trains; float64 shows that its difference is round-off and nothing else."""
    rng = np.random.default_rng(0)
    vgg16, heads = random_weights(rng)
    a, b = rng.uniform(-1, 1, (2, 1, 32, 32, 3)).astype(dtype)

    a_torch = torch.tensor(a).permute(0, 3, 1, 2).requires_grad_()
    expected = torch_lpips(vgg16, heads, a_torch, torch.tensor(b).permute(0, 3, 1, 2))
    expected.sum().backward()
    expected_gradient = a_torch.grad.permute(0, 2, 3, 1).numpy()

    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda x: x.astype(dtype), convert_lpips(vgg16, heads, "the test"))
        found, pullback = jax.vjp(jax.jit(lambda a: lpips_distance(params, a, b)), a)
        found, gradient = np.asarray(found), np.asarray(pullback(np.ones_like(found))[0])
    assert found.dtype == dtype
    error = np.abs(found / expected.detach().numpy() - 1).max()
    gradient_error = np.linalg.norm(gradient - expected_gradient) / np.linalg.norm(expected_gradient)
    print(f"{np.dtype(dtype).name}: LPIPS {found}, relative error {error:.1e}, of its gradient {gradient_error:.1e}")
    assert error <= (1e-5 if dtype == np.float32 else 1e-12)
    # Either library's float32 gradient is 1e-3 from its own float64 one: round-off moves the maxima that pools choose.
    assert gradient_error <= (5e-4 if dtype == np.float32 else 1e-12)
