import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fid_imagegen.training.checksum import checksum

TREE = {
    "kernel": np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32),
    "half": np.arange(16, dtype=np.float32).astype(jnp.bfloat16).reshape(8, 2),
    "nested": {"step": np.int32(7), "flags": np.array([1, 0, 1], np.uint8)},
}


def test_numpy_a_device_and_a_mesh_agree():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    spread = jax.device_put(
        TREE,
        {
            "kernel": NamedSharding(mesh, PartitionSpec("a", "b")),
            "half": NamedSharding(mesh, PartitionSpec(("a", "b"))),
            "nested": NamedSharding(mesh, PartitionSpec()),
        },
    )
    sums = {
        int(checksum(TREE, np)),
        int(jax.jit(checksum)(jax.tree.map(jnp.asarray, TREE))),
        int(jax.jit(checksum)(spread)),
    }
    assert len(sums) == 1


@pytest.mark.parametrize("leaf", ["kernel", "half"])
def test_any_flipped_bit_shows(leaf):
    whole = int(checksum(TREE, np))
    for position in range(0, TREE[leaf].nbytes * 8, 7):
        data = bytearray(TREE[leaf].tobytes())
        data[position // 8] ^= 1 << position % 8
        flipped = np.frombuffer(bytes(data), TREE[leaf].dtype).reshape(TREE[leaf].shape)
        assert int(checksum(TREE | {leaf: flipped}, np)) != whole


def test_what_is_moved_shows():
    whole = int(checksum(TREE, np))
    assert int(checksum(TREE | {"kernel": TREE["kernel"][::-1]}, np)) != whole
    a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert int(checksum({"a": a, "b": b}, np)) != int(checksum({"a": b, "b": a}, np))
