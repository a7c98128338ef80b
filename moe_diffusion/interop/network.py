"""What key maps ask a model about its layers and routers; the one place that knows the answers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from flax import linen as nn

from moe_diffusion.moe.router import Router


class Block(NamedTuple):
    """One layer of a model.

    Attributes:
      path: of its parameters, like "layers_0/block_1"; layers that are stacked share one.
      index: its place on the leading axis of those parameters; None if they have no such axis.
      kind: of layer, like "dense" or "moe".
    """

    path: str
    index: int | None
    kind: Hashable


def block_paths(model: nn.Module) -> tuple[Block, ...]:
    """Every layer of the model in order."""
    return tuple(
        Block(f"layers_{segment}/block_{j}", repeat, "moe" if is_moe else "dense")
        for segment, (period, repeats) in enumerate(model.segments)
        for repeat in range(repeats)
        for j, is_moe in enumerate(period)
    )


def router_of(model: nn.Module) -> Router | None:
    """The router of the model's MoE layers, unbound; None if it has none."""
    return model.make_moe().make_router() if model.make_moe else None
