"""Weights that are split over devices, gathered where they are used.

Left to itself, XLA may sum the gradients of whole weights on every device, or move activations
instead of weights. Here a device gathers the weights that it needs, one mesh axis after the other.
The gradient of that is a reduce-scatter along each axis, which sends half of what a sum sends. The
weights are gathered in the dtype in which they are used, and they are kept for the backward pass
only where `model.remat` is `none`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from moe_diffusion.parallel.mesh import alone, batch_axes, current_mesh, num_batch_shards
from moe_diffusion.parallel.rules import LogicalAxes, current_rules, spec_of

Specs = dict[str, PartitionSpec]


def weight_specs(
    weights: Mapping[str, jax.Array], logical_axes: Mapping[str, LogicalAxes]
) -> Specs:
    """How weights lie on the mesh that is set, by the preset in use (`rules.use_preset`)."""
    mesh, table = current_mesh(), current_rules().params
    return {name: spec_of(x.shape, logical_axes[name], table, mesh) for name, x in weights.items()}


def gather(weights: Mapping[str, jax.Array], specs: Specs, *, keep: str = "") -> dict:
    """Gathers whole weights inside a shard_map that they enter by `specs`.

    keep: a mesh axis over which they stay split.
    """

    def gather_one(value, spec):
        for dimension, axes in enumerate(spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            for axis in reversed(axes):  # the first is the major one, so the last is joined first
                if axis != keep:
                    value = lax.all_gather(value, axis, axis=dimension, tiled=True)
        return value

    return {name: gather_one(value, specs[name]) for name, value in weights.items()}


def with_whole_weights(
    function: Callable, x: jax.Array, weights: dict, logical_axes: Mapping[str, LogicalAxes]
) -> jax.Array:
    """function(x, weights), which each device computes for its part of x's dimension 0.

    Args:
      function: (x, weights) -> array; it works on every row of dimension 0 by itself.
      weights: name -> array.
    """
    specs = weight_specs(weights, logical_axes)
    if not any(any(spec) for spec in specs.values()):
        return function(x, weights)
    return on_own_samples(function, x, weights, specs)


def on_own_samples(function: Callable, x: Any, weights: dict, specs: Specs) -> Any:
    """function(x, weights) on every device, with its part of dimension 0 and whole weights.

    Where the devices do not divide dimension 0, XLA splits the work instead.

    Args:
      function: (x, weights) -> any tree of arrays, with the dimension 0 of x. What it traces sees
        one device.
      x: any tree of arrays with one dimension 0.
      weights: name -> array.
      specs: of `weight_specs`.
    """
    if jax.tree.leaves(x)[0].shape[0] % num_batch_shards() or current_mesh().size <= 1:
        with alone():
            return function(x, weights)

    def on_device(x: Any, weights: dict) -> Any:
        weights = gather(weights, specs)
        with alone():
            return function(x, weights)

    row = PartitionSpec(batch_axes())
    split = jax.shard_map(on_device, in_specs=(row, specs), out_specs=row, check_vma=False)
    return split(x, weights)
