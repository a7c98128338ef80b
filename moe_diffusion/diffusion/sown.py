"""Gathers by name what the routers of all layers sowed: their losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_diffusion.errors import UserError


def sum_by_name(tree: Any) -> dict[str, jax.Array]:
    """Sown losses {path: {name: [layers]}} -> {name: sum over all layers}."""
    return {name: sum(jnp.sum(v) for v in values) for name, values in _by_name(tree).items()}


def mean_by_name(tree: Any) -> dict[str, jax.Array]:
    """Sown metrics {path: {name: [layers]}} -> {name: mean over all layers}."""
    by_name = _by_name(tree).items()
    return {name: jnp.concatenate([jnp.ravel(v) for v in vs]).mean() for name, vs in by_name}


def weigh(losses: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The sum of weights[name] * losses[name].

    Raises:
      UserError: the two do not have the same names.
    """
    if set(losses) != set(weights):
        raise UserError(
            f"loss_weights names {sorted(weights)}, but the model's losses are {sorted(losses)}; "
            "give every loss one weight and no other"
        )
    return sum((weights[name] * losses[name] for name in sorted(losses)), jnp.float32(0.0))


def _by_name(tree: Any) -> dict[str, list[jax.Array]]:
    values: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values.setdefault(path[-1].key, []).append(leaf)
    return values
