import jax
import pytest
from jax.sharding import AxisType

from fid_imagegen.parallel.mesh import batch_sharding, check_batch, make_mesh


@pytest.mark.parametrize(
    ("sizes", "filled"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((8, 1, -1), (8, 1, 1))],
)
def test_a_size_of_minus_one_is_the_devices_left(sizes, filled):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), filled, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3  # Explicit, jax's default, refuses ordinary sharded layers


@pytest.mark.parametrize("sizes", [(4, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_sizes_must_use_all_devices(sizes):
    with pytest.raises(ValueError, match=r"for 8 devices, expected sizes whose product is 8; change config\.mesh"):
        make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 8), (-2, 1, 1)])
def test_sizes_are_positive_with_one_left_open_at_most(sizes):
    with pytest.raises(ValueError, match="expected positive sizes, one at most -1"):
        make_mesh(*sizes)


def test_rows_lie_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(jax.numpy.arange(8), batch_sharding(mesh))
    rows = [shard.index[0].indices(8)[:2] for shard in x.addressable_shards]
    assert sorted(rows) == sorted([(0, 2), (2, 4), (4, 6), (6, 8)] * 2)  # each block twice: `tensor` does not cut rows


@pytest.mark.parametrize(("batch", "accumulate", "ways"), [(6, 1, 4), (4, 2, 8), (12, 2, 8)])
def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(batch, accumulate, ways):
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match=rf"batch size {batch} on a mesh of data 2 x fsdp 2.*a multiple of {ways}"):
        check_batch(batch, accumulate, mesh)
    check_batch(ways, accumulate, mesh)


def test_a_run_checks_its_batch_before_it_writes(tiny, tmp_path):
    from fid_imagegen.training.loop import train

    with pytest.raises(ValueError, match="found batch size 12 on a mesh of data 8 x fsdp 1"):
        train(tiny(batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()
