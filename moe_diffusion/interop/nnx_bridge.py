"""Our models, which are linen modules, as modules of flax.nnx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

from moe_diffusion.models.stack import Model


def to_nnx(
    model: Model, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> nnx.bridge.ToNNX:
    """A module of flax.nnx with these weights: module(x, t, cond, train) is the prediction.

    The weights are plain arrays and can be replaced, trained and saved as in any nnx module: params
    are `nnx.Param`, and what routers keep is of a variable type of its own. What is sown (losses,
    metrics, router_stats) becomes an attribute if a call says `mutable=["losses", ...]`.

    Args:
      model: of `models.build` or `sampling.load_workdir`.
      variables: {"params", "router_state"}, which is not changed.
      rngs: for dropout, if the model has any: nnx.Rngs(dropout=0).
    """
    module = nnx.bridge.ToNNX(model, rngs=rngs)
    arrays = {name: _arrays(tree) for name, tree in variables.items() if tree}
    for name, value in linen_vars_to_nnx_attrs(arrays).items():
        setattr(module, name, nnx.data(value))
    return module


def _arrays(tree: Any) -> Any:
    """Plain dicts of jax arrays."""
    if isinstance(tree, Mapping):
        return {name: _arrays(value) for name, value in tree.items()}
    return jnp.asarray(tree)
