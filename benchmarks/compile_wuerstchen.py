"""Compiles the train step of a Würstchen stage for a TPU slice, without a TPU: does it fit?

    python -m benchmarks.compile_wuerstchen --stage stage_c --topology v5p:4x4x4 \
        mesh.fsdp=64 data.image_size=1024 compressor.size=768

Needs `pip install "jax[tpu]"`, and `ulimit -s 1000000` for the compiler's threads. The step is the loop's: the stage's task,
optimizers, state and sharding rules on the mesh of its config. Every array is abstract, frozen weights too: nothing is read or
allocated. Memory is the compiler's account of one device, and the compiler refuses what does not fit. FLOPs are XLA's count of
the whole step before optimisation, what is recomputed in the backward pass included, with every scan unrolled, for a scan's body
would be counted once.
"""

import argparse
import contextlib
import json
import os
import time
from unittest import mock

# Before jax is imported: libtpu is wanted for its compiler alone, and must not ask for the machine it is on.
os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from fid_imagegen import command, tasks  # noqa: E402
from fid_imagegen.parallel import mesh as meshes  # noqa: E402
from fid_imagegen.parallel import sharding  # noqa: E402
from fid_imagegen.training import ema, optimizer, state  # noqa: E402

GIB = 2**30
HBM = {"TPU v5": 95 * GIB, "TPU v5 lite": 16 * GIB, "TPU v6 lite": 32 * GIB}  # of a device, by its kind


@contextlib.contextmanager
def traced_for_tpu():
    """Models choose forms of an operation by the backend they run on, which here is not the one compiled for."""
    with mock.patch("jax.default_backend", lambda: "tpu"):
        yield


@contextlib.contextmanager
def unrolled_scans():
    """Every scan as its body, over and over."""
    scan = jax.lax.scan
    with mock.patch("jax.lax.scan", lambda *args, **kwargs: scan(*args, **kwargs | {"unroll": True})):
        yield


def lower(config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step of a stage's config, as `training.loop` makes it, lowered for the mesh."""
    meshes.check_batch(config.batch_size, config.accumulate, mesh)
    task = tasks.build(config)
    optimizers = optimizer.build_all(config, task.trained)
    key = jax.eval_shape(lambda: jax.random.key(config.seed))
    abstract = jax.eval_shape(lambda key: state.create(task, optimizers, ema.averages(config), key), key)
    shardings = sharding.resolve(config.sharding.rules, abstract, mesh, min_size=config.sharding.min_size)
    rows = meshes.batch_sharding(mesh)
    step = state.compile_step(task, optimizers, config, mesh, shardings, rows)
    with mock.patch("fid_imagegen.tasks.text.load_clip", _tower):
        frozen = _everywhere(task.frozen(), meshes.replicated(mesh))
    return step.lower(jax.tree.map(_placed, abstract, shardings), frozen, _everywhere(_batch(config), rows), key)


def flops(config) -> float:
    """Of one step on all devices together."""
    with unrolled_scans():
        lowered = lower(config, meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    return lowered.cost_analysis()["flops"]


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device: state, frozen weights and batch; what the step needs beside them; both, with its results and code."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the rest is written over the donated state
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    total = arguments + temporary + results + stats.generated_code_size_in_bytes
    return {"arguments": arguments, "temporary": temporary, "total": total}


def _tower(weights, model):
    """The shapes of a CLIP tower's parameters, in place of reading them."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, model.length), jnp.int32))["params"]


def _batch(config) -> dict[str, jax.ShapeDtypeStruct]:
    rows, size, channels = config.batch_size, config.data.image_size, config.data.channels
    arrays = {"image": ((rows, size, size, channels), jnp.uint8), "label": ((rows,), jnp.int32)}
    if config.text.encoder != "none":
        arrays |= {"tokens": ((rows, config.text.length), jnp.int32), "mask": ((rows, config.text.length), bool)}
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


def _placed(array, where):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)


def _everywhere(tree, where):
    return jax.tree.map(lambda array: _placed(array, where), tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/wuerstchen.py")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--topology", required=True, help="GENERATION:SHAPE, such as v5p:4x4x4 or v6e:16x16")
    parser.add_argument(
        "--level", type=int, help="XLA's optimisation level; 1 compiles a v6e's convolutions in 0.6 of the time"
    )
    parser.add_argument("changes", nargs="*", help="KEY=VALUE of the stage's config")
    args = parser.parse_args()
    config = command.load_config(args.config)[args.stage]
    config.update_from_flattened_dict({key: json.loads(value) for key, value in (c.split("=") for c in args.changes)})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = meshes.make_mesh(**config.mesh, devices=devices)
    with traced_for_tpu():
        lowered = lower(config, mesh)
        began = time.perf_counter()
        compiled = lowered.compile({} if args.level is None else {"optimization_level": args.level})
        seconds = time.perf_counter() - began
        counted = flops(config)
    found, limit = memory(compiled), HBM[devices[0].device_kind]
    result = {"fits": found["total"] < limit, "memory": found, "hbm": limit, "flops": counted, "compile_s": seconds}
    place = {"stage": args.stage, "topology": args.topology, "mesh": dict(mesh.shape), "batch": config.batch_size}
    print(json.dumps(place | result))
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.items())
    print(
        f"{args.stage} on {len(devices)} x {devices[0].device_kind}: {sizes} of {limit / GIB:.0f} GiB a device; "
        f"{counted / 1e15:.2f} PFLOP a step; compiled in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
