"""Tensor parallelism: devices that share the work on one sample (preset `tp`).

A linear layer whose kernel is split along its outputs, heads or hidden units, takes all tokens and
makes a part of the features. One that is split along its inputs takes such a part, and its sums
come back split over tokens. What stands between the two kinds, norms and residual sums and layers
whose kernel is whole, works on a part of the tokens. Source: 1909.08053, section 3, and 2205.05198,
section 4.2.2. With any other preset all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_diffusion.parallel.mesh import batch_axes, current_mesh, num_batch_shards
from moe_diffusion.parallel.rules import LogicalAxes, current_rules, spec_of
from moe_diffusion.parallel.weights import with_whole_weights

AXIS = "tensor"


def num_parts() -> int:
    """Number of devices that share one sample; 1 where no mesh is set."""
    shares = any(AXIS in axes for axes in current_rules().params.values())
    return current_mesh().shape.get(AXIS, 1) if shares else 1


def num_head_parts(heads: int) -> int:
    """Number of devices that share `heads` heads of a sample; 1 if they do not divide them."""
    return 1 if heads % num_parts() else num_parts()


def split_linear(
    function: Callable[[jax.Array, dict], jax.Array],
    x: jax.Array,
    weights: dict[str, jax.Array],
    axes: Mapping[str, LogicalAxes],
    contract: int,
) -> jax.Array:
    """function(x, weights), a linear layer, split over devices as the preset says.

    Args:
      x: [B, *inputs] or [B, S, .., *inputs].
      weights: "kernel" [*inputs, *features] and maybe more.
      axes: the logical axes of every weight.
      contract: number of axes in `inputs`.

    Returns:
      [B, .., *features].
    """
    if num_parts() == 1:
        return with_whole_weights(function, x, weights, axes)
    kernel, names = weights["kernel"].shape, axes["kernel"]
    inputs, features = names[:contract], names[contract:]
    between = x.ndim - 1 - contract  # axes of x besides those of the batch and the inputs
    by_token = ("batch", *("tokens", None, None)[:between])
    all_tokens = ("batch", *[None] * between)
    divided = any(_spec(kernel, names))
    x = constrain(x, (*(all_tokens if divided else by_token), *inputs))
    y = function(x, weights)
    if not _spec(kernel[contract:], features) == _spec(kernel[contract:], ()):
        y = constrain(y, (*all_tokens, *features))
        # A vector of a sample is modulation: small, and used whole by all tokens.
        return y if between else constrain(y, ("batch",))
    return constrain(y, by_token)


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Lays x out by the logical axes `batch`, `tokens`, `heads`, `mlp` of its first dimensions."""
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes))


def by_heads(function: Callable[..., jax.Array], *arrays: jax.Array) -> Any:
    """function(q, k, v, ..) of [B, heads, S, d], each device for its own samples and heads.

    Heads are split only where they divide, those of k and v too. What stands after v may be [B, 1,
    ..], for all heads.
    """
    mesh, (q, k, *_) = current_mesh(), arrays
    if mesh.size <= 1 or q.shape[0] % num_batch_shards():
        return function(*arrays)
    spec = jax.P(batch_axes(), AXIS if num_head_parts(k.shape[1]) > 1 else None)
    specs = tuple(spec if x.shape[1] > 1 else jax.P(batch_axes()) for x in arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _spec(shape: tuple[int, ...], axes: LogicalAxes) -> jax.P:
    mesh = current_mesh()
    table = current_rules().params | {"batch": batch_axes(), "tokens": (AXIS,)}
    padded = (*axes, *[None] * (len(shape) - len(axes)))
    return spec_of(shape, padded, table, mesh)
