"""ResNet-56 against a twin written with torch.nn.functional, on the same fully randomised weights."""

import jax
import numpy as np
import pytest

from fid_imagegen.interop.resnet56 import load_resnet56
from fid_imagegen.models.features.resnet56 import ResNet56

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


def random_weights(rng):
    weights = {}

    def add(conv, norm, channels_in, channels):
        weights[f"{conv}.weight"] = rng.normal(0, np.sqrt(2 / (9 * channels_in)), (channels, channels_in, 3, 3))
        for leaf, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            weights[f"{norm}.{leaf}"] = rng.uniform(low, low + 1, channels)

    add("conv1", "bn1", 3, 16)
    channels_in = 16
    for stage, channels in enumerate((16, 32, 64), start=1):
        for block in range(9):
            add(f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.bn1", channels_in, channels)
            add(f"layer{stage}.{block}.conv2", f"layer{stage}.{block}.bn2", channels, channels)
            channels_in = channels
    weights |= {"linear.weight": rng.normal(size=(10, 64)), "linear.bias": rng.normal(size=10)}
    return {name: x.astype(np.float32) for name, x in weights.items()}


def torch_resnet56(weights, images):
    functional = torch.nn.functional
    weights = {name: torch.tensor(x, dtype=images.dtype) for name, x in weights.items()}

    def conv_norm(x, conv, norm, stride):
        x = functional.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, weight, bias = (weights[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    x = functional.relu(conv_norm(images, "conv1", "bn1", 1))
    for stage in (1, 2, 3):
        for block in range(9):
            name, down = f"layer{stage}.{block}", stage > 1 and block == 0
            y = functional.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1", 2 if down else 1))
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", 1)
            pad = x.shape[1] // 2
            x = functional.relu(y + (functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)) if down else x))
    features = x.mean((2, 3))
    return features, features @ weights["linear.weight"].T + weights["linear.bias"]


def test_features_and_logits_match_torch(tmp_path):
    rng = np.random.default_rng(0)
    weights = random_weights(rng)
    np.savez(tmp_path / "weights.npz", **weights)
    images = rng.uniform(0, 1, (2, 32, 32, 3))
    normalised = (images - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = torch_resnet56(weights, torch.tensor(normalised).permute(0, 3, 1, 2))
    with jax.enable_x64(True):  # random weights amplify float32 round-off through 55 layers
        params = jax.tree.map(lambda x: x.astype(np.float64), load_resnet56(tmp_path / "weights.npz"))
        found = jax.tree.map(np.asarray, jax.jit(ResNet56().apply)({"params": params}, images * 2 - 1))
    errors = [
        float(np.abs(f - e.numpy()).max() / np.abs(e.numpy()).max()) for f, e in zip(found, expected, strict=True)
    ]
    print(f"relative errors of features and logits: {errors}")
    assert max(errors) <= 1e-12
