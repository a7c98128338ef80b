"""Weights that are split over devices, gathered where they are used.

Left to itself, XLA may sum the gradients of whole weights on every device, or move activations
instead of weights. Here a device gathers the weights that it needs, one mesh axis after the other;
the gradient of that is a reduce-scatter along each axis, which sends half of what a sum does. They
are gathered in the type in which they are used, and not kept for the backward pass where
`model.remat` is anything but `none`.
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
    """Whole weights, in a shard_map that they enter by `specs`; over axis `keep` still split."""

    def gather_one(value, spec):
        for dimension, axes in enumerate(spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            for axis in reversed(axes):  # the first is the major one, so the last is joined first
                if axis != keep:
                    value = lax.all_gather(value, axis, axis=dimension, tiled=True)
        return value

    return {name: gather_one(value, specs[name]) for name, value in weights.items()}


def with_whole_weights(
    function: Callable[[jax.Array, dict], jax.Array],
    x: jax.Array,
    weights: dict[str, jax.Array],
    logical_axes: Mapping[str, LogicalAxes],
) -> jax.Array:
    """function(x, weights), each device for its part of x's dimension 0.

    function works on every row of dimension 0 by itself.
    """
    specs = weight_specs(weights, logical_axes)
    if x.shape[0] % num_batch_shards() or not any(any(spec) for spec in specs.values()):
        return function(x, weights)
    by_row = PartitionSpec(batch_axes())
    return jax.shard_map(
        lambda x, weights: function(x, gather(weights, specs)),
        in_specs=(by_row, specs),
        out_specs=by_row,
        check_vma=False,
    )(x, weights)
