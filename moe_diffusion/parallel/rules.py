"""Presets: which array is split over which mesh axis.

Modules name the dimensions of their parameters by logical axes (`layers`, `expert`, `embed`,
`mlp`, `heads`). A preset maps logical axes to mesh axes, once for the parameters and once for what
is only touched by the update (optimizer state and EMAs):

| preset    | parameters            | optimizer state, EMAs | parameters, gradients, Adam, one EMA |
|-----------|-----------------------|-----------------------|--------------------------------------|
| `dp`      | whole                 | whole                 | 5 P on each device                   |
| `zero1`   | whole                 | `embed` over `data`   | 2 P + 3 P / devices                  |
| `fsdp`    | `embed` over `fsdp`,  | as the parameters     | 5 P / devices + a layer              |
|           | `data`                |                       |                                      |
| `fsdp_ep` | `expert` over         | as the parameters     | 5 P / devices + a layer's dense part |
|           | `expert`, `embed`     |                       | and a device's own experts           |
|           | over what is left     |                       |                                      |
| `tp`      | `heads`, `mlp` over   | `embed` over `data`   | (2 P + 3 P / data) / tensor          |
|           | `tensor`              | with them             |                                      |

Every preset but `tp` splits the batch over all devices. `tp` is for batches smaller than the number
of devices: those along `tensor` share each sample (tensor_parallel.py). Where nothing is recomputed
(model.remat = none), `fsdp` and `fsdp_ep` also keep the weights that they gathered, in the compute
dtype.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_diffusion.parallel.mesh import batch_axes, scoped

LogicalAxes = tuple[str | None, ...] | PartitionSpec
Table = dict[str, tuple[str, ...]]  # logical axis -> mesh axes; others are not split


class Rules(NamedTuple):
    """How a preset splits the parameters, and gradients, optimizer state and EMAs (`update`)."""

    params: Table
    update: Table


_EP = {"expert": ("expert",), "embed": ("fsdp", "expert")}
_TP = {"heads": ("tensor",), "mlp": ("tensor",)}
PRESETS = {
    "dp": Rules(params={}, update={}),
    "zero1": Rules(params={}, update={"embed": ("data",)}),
    "fsdp": Rules(params={"embed": ("fsdp", "data")}, update={"embed": ("fsdp", "data")}),
    "fsdp_ep": Rules(params=_EP, update=_EP),
    "tp": Rules(params=_TP, update=_TP | {"embed": ("data",)}),
}
_PRESET = contextvars.ContextVar("preset", default="dp")


def use_preset(preset: str | None) -> contextlib.AbstractContextManager[None]:
    """Makes what is traced inside expect its weights as `preset` says; None changes nothing."""
    return scoped(_PRESET, preset or _PRESET.get())


def current_rules() -> Rules:
    """The rules of the innermost `use_preset`; those of `dp` outside of any."""
    return PRESETS[_PRESET.get()]


def batch_sharding(mesh: Mesh, micro_batches: bool = False) -> NamedSharding:
    """Sharding of a batch [B, ...] or, with micro-batches, of [A, B / A, ...], along B."""
    leading = (None,) if micro_batches else ()
    return NamedSharding(mesh, PartitionSpec(*leading, batch_axes(mesh)))


def shardings_of(mesh: Mesh, table: Table, tree: Any, logical_axes: Any) -> Any:
    """A NamedSharding for every leaf of a tree that holds parameters, or something of their shape.

    A leaf has the logical axes of the parameter whose whole path is the tail of the leaf's path.
    So do moments and averages. Other leaves (counts, router state) are whole on every device.

    Args:
      table: one of the two of `Rules`.
      logical_axes: tree with a tuple or PartitionSpec of names for each of the model's parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(logical_axes, lambda x: isinstance(x, tuple))
    axes_of = {_names(path): axes for path, axes in leaves}

    def shard(path: tuple, leaf: Any) -> NamedSharding:
        names = _names(path)
        tails = (names[start:] for start in range(len(names)))
        axes = next((axes_of[tail] for tail in tails if tail in axes_of), ())
        return NamedSharding(mesh, spec_of(leaf.shape, axes, table, mesh))

    return jax.tree_util.tree_map_with_path(shard, tree)


def spec_of(
    shape: tuple[int, ...], axes: LogicalAxes, table: Table, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Splits each dimension as the table says, over those of the axes that divide and are free."""
    spec, taken = [], set()
    for size, name in zip(shape, axes, strict=False):
        used = dividing(size, tuple(a for a in table.get(name, ()) if a not in taken), mesh)
        taken.update(used)
        spec.append(used[0] if len(used) == 1 else used or None)
    return PartitionSpec(*spec)


def dividing(size: int, axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The longest beginning of the mesh axes whose devices divide a dimension of a size."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _names(path: tuple) -> tuple[str, ...]:
    """The text of every step of a key path: a dict key, an attribute or an index."""
    return tuple(jax.tree_util.keystr((step,), simple=True) for step in path)
