"""The device mesh: `data` (copies of the model), `fsdp` (parameters cut over the batch's devices), `tensor` (layers cut)."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Logical names of activation axes -> mesh axes; used by `nn.logical_axis_rules`.
ACTIVATION_RULES = (
    ("batch", BATCH),
    ("tokens", None),
    ("features", None),
    ("heads", "tensor"),
    ("hidden", "tensor"),
)


def make_mesh(data: int, fsdp: int, tensor: int, *, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh of all devices. One size may be -1: the devices that are left.

    Axes are Auto: jax's default axis type (Explicit) refuses ordinary sharded layers.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"found mesh {dict(zip(AXES, sizes, strict=True))}, expected positive sizes, one at most -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"found mesh {dict(zip(AXES, sizes, strict=True))} for {len(devices)} devices, expected sizes whose product is "
            f"{len(devices)}; change config.mesh"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets the same number of rows of every micro-batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size % ways:
        raise ValueError(
            f"found batch size {batch_size} on a mesh of data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} with "
            f"{accumulate} micro-batches, expected a multiple of {ways}; "
            "change config.batch_size, config.accumulate or config.mesh"
        )
