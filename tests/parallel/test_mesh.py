from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_diffusion.parallel.mesh import (
    AXES,
    _ring,
    batch_axes,
    make_mesh,
    num_batch_shards,
    num_expert_shards,
)
from moe_diffusion.planning.topologies import describe
from tests.training import toy


@pytest.mark.parametrize("preset,axis", [("dp", "data"), ("zero1", "data"), ("fsdp", "fsdp")])
def test_a_preset_gives_all_devices_to_one_axis(preset, axis):
    mesh = make_mesh(toy.make_config(parallel__preset=preset).parallel)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {name: 8 if name == axis else 1 for name in AXES}
    assert num_batch_shards(mesh) == 8


@pytest.mark.parametrize(("sharing", "fsdp", "expert"), [(0, 1, 8), (2, 4, 2), (1, 8, 1)])
def test_expert_parallelism_shares_the_devices_out(sharing, fsdp, expert):
    config = toy.make_config(parallel__preset="fsdp_ep", parallel__expert=sharing)
    mesh = make_mesh(config.parallel)
    assert dict(mesh.shape) == {"slice": 1, "data": 1, "fsdp": fsdp, "expert": expert, "tensor": 1}
    with jax.set_mesh(mesh):
        assert (num_batch_shards(), num_expert_shards()) == (8, expert)


@pytest.mark.parametrize(("sharing", "data", "tensor"), [(0, 1, 8), (2, 4, 2), (1, 8, 1)])
def test_tensor_parallelism_shares_the_devices_out(sharing, data, tensor):
    """Those that share a sample are no parts of the batch."""
    mesh = make_mesh(toy.make_config(parallel__preset="tp", parallel__tensor=sharing).parallel)
    assert dict(mesh.shape) == {"slice": 1, "data": data, "fsdp": 1, "expert": 1, "tensor": tensor}
    assert num_batch_shards(mesh) == data


@pytest.mark.parametrize(
    ("shape", "devices_per_chip", "ring"),
    [
        ((4, 4, 1), 1, 4),
        ((16, 8, 1), 1, 16),
        ((4, 4, 4), 2, 4),
        ((2, 4, 1), 1, 8),
        ((2, 2, 4), 1, 16),
    ],
)
def test_parameters_are_split_along_a_ring_of_a_torus_of_tpus(shape, devices_per_chip, ring):
    """Of a slice at most two chips wide all devices lie on one ring."""
    places = [place for place in np.ndindex(shape) for _ in range(devices_per_chip)]
    assert _ring([SimpleNamespace(platform="tpu", coords=place) for place in places]) == ring
    assert _ring([SimpleNamespace(platform="cuda")] * 16) == 16


def test_batch_shards_of_the_mesh_that_is_set():
    mesh = make_mesh(toy.make_config().parallel, jax.devices()[:4])
    assert (batch_axes(), num_batch_shards()) == ((), 1)
    with jax.set_mesh(mesh):
        shards = jax.jit(lambda: num_batch_shards())
        assert int(shards()) == 4
        assert batch_axes() == ("slice", "data", "fsdp", "expert")
    assert int(jax.jit(lambda: num_batch_shards())()) == 1


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("preset", "inside"),
    [("dp", (8, 1, 1, 1)), ("fsdp", (1, 8, 1, 1)), ("fsdp_ep", (1, 2, 4, 1)), ("tp", (4, 1, 1, 2))],
)
def test_slices_lie_along_the_first_axis(preset, inside):
    devices = describe("v5e:2x4", slices=2).devices
    mesh = make_mesh(ConfigDict({"preset": preset, "expert": 4, "tensor": 2}), devices[::-1])
    assert tuple(mesh.shape.values()) == (2, *inside) and num_batch_shards(mesh) == 16 // inside[3]
    for part in mesh.devices:
        assert len({device.slice_index for device in part.flat}) == 1
