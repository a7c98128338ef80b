"""What every training objective shares: its form, its draws, the forward pass, router losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from moe_diffusion.conditions import drop
from moe_diffusion.diffusion import sown as aux_losses

# (params, router_state, batch, key, frozen) -> (loss, aux); frozen: what is not trained, see
# training/step.py
LossFn = Callable[..., tuple[jax.Array, "LossAux"]]


class Draws(NamedTuple):
    """All randomness of one loss evaluation.

    Attributes:
      t: [B], float32 in (0, 1) for a flow, integer steps for DDPM.
      noise: [B, H, W, C], standard normal.
      drop_uniform: [B]; a condition is dropped where it is below `cond_dropout`.
      dropout: key of the network's own dropout; None for a network without.
    """

    t: jax.Array
    noise: jax.Array
    drop_uniform: jax.Array
    dropout: jax.Array | None = None


class LossAux(NamedTuple):
    """What a loss reports beside its value.

    Attributes:
      metrics: name -> scalar, for logging only.
      router_stats: statistics for `model.update_router_state`; {} if the router keeps no state.
    """

    metrics: dict[str, jax.Array]
    router_stats: Any


def forward(
    model: nn.Module,
    params: Any,
    router_state: Any,
    x_t: jax.Array,
    t: jax.Array,
    cond: Mapping[str, jax.Array],
    dropped: jax.Array,
    dropout: jax.Array | None = None,
) -> tuple[jax.Array, Mapping[str, Any]]:
    """The network's training output, and what its routers sowed.

    Args:
      t: f32[B], as the network wants it.
      cond: the condition; where dropped (bool[B]) the network sees none.
      dropout: see `Draws`.
    """
    return model.apply(
        {"params": params, "router_state": router_state},
        x_t,
        t,
        drop(model, cond, dropped),
        True,
        rngs={} if dropout is None else {"dropout": dropout},
        mutable=["losses", "metrics", "router_stats"],
    )


def with_router_losses(
    loss: jax.Array,
    sown: Mapping[str, Any],
    loss_weights: Mapping[str, float],
    **metrics: jax.Array,
) -> tuple[jax.Array, LossAux]:
    """`loss` plus the weighted losses of the routers, and the report.

    Args:
      loss_weights: name -> weight; the names must be those that the routers return.
      metrics: to be reported next to "loss" (the sum), every router's loss (unweighted, summed
        over layers) and the routers' metrics (mean over layers).
    """
    named = aux_losses.sum_by_name(sown.get("losses", {}))
    loss = loss + aux_losses.weigh(named, loss_weights)
    router_metrics = aux_losses.mean_by_name(sown.get("metrics", {}))
    metrics = {"loss": loss, **metrics, **named, **router_metrics}
    return loss, LossAux(metrics, sown.get("router_stats", {}))
