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

The batch is split over all devices in each of them. Where nothing is recomputed (model.remat =
none), `fsdp` and `fsdp_ep` also keep the weights that they gathered, in the compute dtype.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_diffusion.parallel.mesh import batch_axes

LogicalAxes = tuple[str | None, ...]


class Rules(NamedTuple):
    """Logical axis -> mesh axes; an axis that is not named is not split."""

    params: dict[str, tuple[str, ...]]
    update: dict[str, tuple[str, ...]]  # gradients, optimizer state and EMAs


_EP = {"expert": ("expert",), "embed": ("fsdp", "expert")}


PRESETS = {
    "dp": Rules(params={}, update={}),
    "zero1": Rules(params={}, update={"embed": ("data",)}),
    "fsdp": Rules(params={"embed": ("fsdp", "data")}, update={"embed": ("fsdp", "data")}),
    "fsdp_ep": Rules(params=_EP, update=_EP),
}


_PRESET = contextvars.ContextVar("preset", default="dp")


@contextlib.contextmanager
def use_preset(preset: str | None) -> Iterator[None]:
    """What is traced inside takes its weights to lie as `preset` says; None changes nothing."""
    token = _PRESET.set(preset or _PRESET.get())
    try:
        yield
    finally:
        _PRESET.reset(token)


def current_rules() -> Rules:
    """Of the innermost `use_preset`; outside of any, of `dp`."""
    return PRESETS[_PRESET.get()]


def batch_sharding(mesh: Mesh, micro_batches: bool = False) -> NamedSharding:
    """Sharding of a batch [B, ...] or, with micro-batches, of [A, B / A, ...], along B."""
    leading = (None,) if micro_batches else ()
    return NamedSharding(mesh, PartitionSpec(*leading, batch_axes(mesh)))


def state_shardings(mesh: Mesh, preset: str, abstract_state: Any, logical_axes: Any) -> Any:
    """A NamedSharding for every leaf of a `TrainState`.

    Args:
      abstract_state: TrainState of arrays or ShapeDtypeStructs.
      logical_axes: tree with a tuple of names for each of the model's parameters.
    """
    rules = PRESETS[preset]
    update = shardings_of(mesh, rules.update, abstract_state, logical_axes)
    params = shardings_of(mesh, rules.params, abstract_state.params, logical_axes)
    return update.replace(params=params)


def shardings_of(
    mesh: Mesh, table: dict[str, tuple[str, ...]], tree: Any, logical_axes: Any
) -> Any:
    """A NamedSharding for every leaf of a tree that holds parameters, or something of their shape.

    A leaf takes the logical axes of the parameter whose whole path is the tail of the leaf's path
    (so do moments and averages); leaves without one (counts, router state) are replicated.

    table: logical axis -> mesh axes, of `Rules`.
    """
    axes_of = _by_path(logical_axes)

    def shard(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(_name(key) for key in path)
        tails = (names[start:] for start in range(len(names)))
        axes = next((axes_of[tail] for tail in tails if tail in axes_of), ())
        return NamedSharding(mesh, spec_of(leaf.shape, axes, table, mesh))

    return jax.tree_util.tree_map_with_path(shard, tree)


def spec_of(
    shape: tuple[int, ...],
    axes: LogicalAxes,
    table: dict[str, tuple[str, ...]],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Splits each dimension as the table says, unless it does not divide or the axis is taken."""
    spec: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
    for size, name in zip(shape, axes, strict=False):
        free = tuple(a for a in table.get(name, ()) if a not in taken and mesh.shape.get(a, 1) > 1)
        fits = size % math.prod(mesh.shape[axis] for axis in free) == 0
        used = free if fits else ()
        taken.update(used)
        spec.append(used[0] if len(used) == 1 else used or None)
    return PartitionSpec(*spec)


def _by_path(logical_axes: Any) -> dict[tuple[str, ...], LogicalAxes]:
    leaves = jax.tree_util.tree_leaves_with_path(
        logical_axes, is_leaf=lambda node: isinstance(node, tuple)
    )
    return {tuple(_name(key) for key in path): axes for path, axes in leaves}


def _name(key: Any) -> str:
    """The text of one step of a key path: a dict key, an attribute or an index."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
