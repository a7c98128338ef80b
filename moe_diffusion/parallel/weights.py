"""Weights that are split over devices, gathered where they are used.

Left to itself, XLA may sum the gradients of whole weights on every device, or move activations
instead of weights. Here a device gathers the weights that it needs, one mesh axis after the other.
The gradient of that is a reduce-scatter along each axis, which sends half of what a sum sends. The
weights are gathered in the dtype in which they are used, and they are kept for the backward pass
only where `model.remat` is `none`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax import lax
from jax.sharding import PartitionSpec

from moe_diffusion.parallel.mesh import batch_axes, num_batch_shards
from moe_diffusion.parallel.rules import LogicalAxes, current_rules, spec_of

Specs = dict[str, PartitionSpec]


def weight_specs(
    weights: Mapping[str, jax.Array], logical_axes: Mapping[str, LogicalAxes]
) -> Specs:
    """How weights lie on the mesh that is set, by the preset in use (`rules.use_preset`)."""
    mesh, table = jax.sharding.get_abstract_mesh(), current_rules().params
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
    if x.shape[0] % num_batch_shards() or not any(any(spec) for spec in specs.values()):
        return function(x, weights)

    def on_device(x: jax.Array, weights: dict) -> jax.Array:
        return function(x, gather(weights, specs))

    row = PartitionSpec(batch_axes())
    split = jax.shard_map(on_device, in_specs=(row, specs), out_specs=row, check_vma=False)
    return split(x, weights)
