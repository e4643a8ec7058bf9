import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.interop.resnet56 import load_resnet56
from fid_imagegen.models.features.resnet56 import ResNet56


def random_tensors():
    rng = np.random.default_rng(0)
    tensors = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    norms, before = {"bn1": 16}, 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(9):
            name = f"layer{stage}.{block}"
            tensors |= {f"{name}.conv1.weight": (width, before, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width}
            before = width
    leaves = ("weight", "bias", "running_mean", "running_var")
    tensors |= {f"{name}.{leaf}": (width,) for name, width in norms.items() for leaf in leaves}
    return {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in tensors.items()}


def test_every_tensor_lands_in_its_place(tmp_path):
    tensors = random_tensors()
    np.savez(tmp_path / "w.npz", **tensors)
    params = load_resnet56(tmp_path / "w.npz")
    block, name = params["layer2_0"], "layer2.0"
    np.testing.assert_array_equal(block["conv1"]["kernel"], tensors[f"{name}.conv1.weight"].transpose(2, 3, 1, 0))
    for ours, theirs in {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}.items():
        np.testing.assert_array_equal(block["bn2"][ours], tensors[f"{name}.bn2.{theirs}"])
    np.testing.assert_array_equal(params["linear"]["kernel"], tensors["linear.weight"].T)
    total = sum(float(x.sum(dtype=np.float64)) for x in jax.tree.leaves(params))
    assert total == pytest.approx(sum(float(x.sum(dtype=np.float64)) for x in tensors.values()), rel=1e-12)
    jax.eval_shape(ResNet56().apply, {"params": params}, jnp.zeros((1, 32, 32, 3)))


def test_missing_tensors_are_listed(tmp_path):
    tensors = random_tensors()
    del tensors["bn1.running_mean"], tensors["layer3.8.conv2.weight"]
    np.savez(tmp_path / "w.npz", **tensors)
    with pytest.raises(ValueError, match=r"missing: (?=.*bn1\.running_mean)(?=.*layer3\.8\.conv2\.weight)"):
        load_resnet56(tmp_path / "w.npz")
