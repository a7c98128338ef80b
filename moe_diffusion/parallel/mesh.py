"""The device mesh: four axes, of which a preset gives all devices to one.

| axis     | splits                                                       |
|----------|--------------------------------------------------------------|
| `data`   | the batch                                                    |
| `fsdp`   | the batch, and parameters and optimizer state with it        |
| `expert` | experts (size 1 in all of today's presets)                   |
| `seq`    | tokens of a sample (size 1 in all of today's presets)        |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "seq")
BATCH_AXES = ("data", "fsdp")


def make_mesh(parallel_config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all of all processes) for `parallel_config.preset`.

    `dp` and `zero1` lay the devices along `data`, `fsdp` along `fsdp`; other axes have size 1.
    """
    devices = jax.devices() if devices is None else devices
    wide = "fsdp" if parallel_config.preset == "fsdp" else "data"
    sizes = [len(devices) if axis == wide else 1 for axis in AXES]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_axes(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """Axes over which dimension 0 of a batch is split, of `mesh` or of the mesh that is set.

    () where no mesh is set. Works inside jit.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def num_batch_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of parts into which a batch is split; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def platform() -> str:
    """ "cpu", "tpu" or "cuda": of the mesh that is set, which may be of absent devices; else JAX's.

    Works inside jit.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
