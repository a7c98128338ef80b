"""Classifier-free guidance (arXiv 2207.12598) around any velocity function.

v = v_null + scale * (v_cond - v_null)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Cond = Mapping[str, jax.Array]
# (x [B, H, W, C], t scalar f32, cond {field: [B, ...]}) -> [B, H, W, C_out]
ConditionalVelocity = Callable[[jax.Array, jax.Array, Cond], jax.Array]


def combine(
    conditional: jax.Array, unconditional: jax.Array, scale: float, channels: int | None = None
) -> jax.Array:
    """Extrapolates from the unconditional to the conditional prediction.

    Args:
      conditional, unconditional: [B, H, W, C].
      channels: guide only the first so many channels and leave the others conditional: 3 in the
        `forward_with_cfg` of DiT and its descendants; None guides all, as the flow samplers do.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    return jnp.concatenate([guided[..., :channels], conditional[..., channels:]], axis=-1)


def guide(
    velocity: ConditionalVelocity,
    null: Callable[[Cond], Any],
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    joint: bool = False,
) -> ConditionalVelocity:
    """Wraps `velocity` with guidance; `scale` 1 returns it as it is, at no extra cost.

    Args:
      null: cond -> that of the unconditional prediction, as `model.null` makes it.
      interval: guide where low < t < high, strictly (arXiv 2404.07724); elsewhere the
        unconditional pass is not computed. An end at 0 or 1 is no bound, so that the default
        also guides the evaluations at t=0 and, for Heun, at t=1.
      channels: see `combine`.
      joint: one forward pass of the concatenated batch [conditional, unconditional], as
        `forward_with_cfg`, instead of two. The choice matters to routers whose group is the
        batch: jointly, both halves compete for the same experts.
    """
    if scale == 1.0:
        return velocity
    low, high = interval

    def guided(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        cond, absent = dict(cond), dict(null(cond))
        if joint:
            twice = jax.tree.map(lambda *pair: jnp.concatenate(pair), (x, cond), (x, absent))
            conditional, unconditional = jnp.split(velocity(twice[0], t, twice[1]), 2)
        else:
            conditional, unconditional = velocity(x, t, cond), velocity(x, t, absent)
        return combine(conditional, unconditional, scale, channels)

    if low <= 0.0 and high >= 1.0:
        return guided

    def guided_inside(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        inside = jnp.logical_and(t > low if low > 0.0 else True, t < high if high < 1.0 else True)
        return jax.lax.cond(inside, guided, velocity, x, t, dict(cond))

    return guided_inside
