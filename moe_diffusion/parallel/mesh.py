"""The device mesh: five axes; a preset gives all devices of a slice to one or two.

| axis     | splits                                                       |
|----------|--------------------------------------------------------------|
| `slice`  | the batch, between slices of TPU chips (parameters are whole) |
| `data`   | the batch (preset `fsdp`: and parameters, as `fsdp`)         |
| `fsdp`   | the batch, and parameters and optimizer state with it        |
| `expert` | the batch, and experts with it (moe/transport.py)            |
| `tensor` | what one sample needs: heads, hidden units, tokens           |
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from moe_diffusion.slices import slices_of

AXES = ("slice", "data", "fsdp", "expert", "tensor")
BATCH_AXES = AXES[:-1]
# Preset -> its two axes; a key of the section `parallel` has the size of the first.
_AXES_OF = {"fsdp": ("fsdp", "data"), "fsdp_ep": ("expert", "fsdp"), "tp": ("tensor", "data")}
_POOLS = contextvars.ContextVar("pools", default=0)
_ALONE = contextvars.ContextVar("alone", default=False)
_NO_MESH = AbstractMesh((), ())


def make_mesh(parallel_config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all of all processes) for `parallel_config.preset`.

    `dp` and `zero1` lay the devices along `data`, `fsdp` along `fsdp` and, on a torus of TPU chips,
    `data` (`_ring`). `fsdp_ep` lays them along `fsdp` and, `parallel.expert` of them (0: all),
    `expert`, and `tp` along `data` and, `parallel.tensor` of them (0: all), `tensor`. Other axes
    have size 1. Several slices of TPU chips lie along `slice`: between them, over the data center's
    network, only gradients are summed.
    """
    slices = slices_of(jax.devices() if devices is None else devices)
    first, preset = slices[0], parallel_config.preset
    shape, (inner, outer) = dict.fromkeys(AXES, 1), _AXES_OF.get(preset, ("data", "fsdp"))
    size = _ring(first) if preset == "fsdp" else getattr(parallel_config, inner, 0)
    shape[inner] = size or len(first)
    shape[outer] = len(first) // shape[inner]
    types, sizes = (AxisType.Auto,) * len(AXES), [*shape.values()]
    parts = [jax.make_mesh(sizes, AXES, types, devices=own).devices for own in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=types)


def _ring(devices: Sequence[jax.Device]) -> int:
    """Devices along the longest side of a slice of TPU chips; of anything else, all of them.

    XLA:TPU reduce-scatters along a ring. For a group that fills a torus it sums whole arrays on all
    devices instead and then takes a part, which sends twice as much.
    """
    if devices[0].platform != "tpu":
        return len(devices)
    sides = sorted(len({device.coords[axis] for device in devices}) for axis in range(3))
    chips = len({tuple(device.coords) for device in devices})
    is_torus = sides[1] > 2 and math.prod(sides) == chips
    return sides[-1] if is_torus else len(devices)


def current_mesh() -> AbstractMesh:
    """The mesh that is set, or one without axes, of one device. Works inside jit."""
    return _NO_MESH if _ALONE.get() else jax.sharding.get_abstract_mesh()


def alone() -> contextlib.AbstractContextManager[None]:
    """Makes what is traced inside, in a shard_map, see a mesh of one device."""
    return scoped(_ALONE, True)


def batch_axes(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """Axes over which dimension 0 of a batch is split, of `mesh` or of the mesh that is set.

    () where no mesh is set. Works inside jit.
    """
    mesh = current_mesh() if mesh is None else mesh
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def num_batch_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of parts into which a batch is split; 1 where no mesh is set."""
    mesh = current_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


@contextlib.contextmanager
def scoped(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    """Gives a variable a value for what is traced inside."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def use_pools(num: int) -> contextlib.AbstractContextManager[None]:
    """Makes what is traced inside see a batch as `num` pools of consecutive samples; 0: as none."""
    return scoped(_POOLS, num)


def num_pools(default: int) -> int:
    """Number of pools that the innermost `use_pools` makes of a batch; `default` outside of any."""
    return _POOLS.get() or default


def by_group(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """function(*arrays), each device for its own part of dimension 0, where the batch is split.

    For what XLA would gather all of: it does not split a sort or a top-k over a batch dimension.
    """
    shards = num_batch_shards()
    if shards == 1 or arrays[0].shape[0] % shards:
        return function(*arrays)
    spec = PartitionSpec(batch_axes())
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def num_expert_shards() -> int:
    """Number of devices that share the experts; 1 where no mesh is set."""
    return current_mesh().shape.get("expert", 1)


def platform() -> str:
    """ "cpu", "tpu" or "cuda": of the mesh that is set, which may be of absent devices; else JAX's.

    Works inside jit.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
