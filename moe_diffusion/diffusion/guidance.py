"""Classifier-free guidance (arXiv 2207.12598) around any velocity function.

v = v_null + scale * (v_label - v_null)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (x [B, H, W, C], t scalar f32, label i32[B]) -> [B, H, W, C_out]
LabelledVelocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
    velocity: LabelledVelocity,
    null_label: int,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    joint: bool = False,
) -> LabelledVelocity:
    """Wraps `velocity` with guidance; `scale` 1 returns it as it is, at no extra cost.

    Args:
      null_label: label of the unconditional prediction.
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

    def guided(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        null = jnp.full_like(label, null_label)
        if joint:
            both = velocity(jnp.concatenate([x, x]), t, jnp.concatenate([label, null]))
            conditional, unconditional = jnp.split(both, 2)
        else:
            conditional, unconditional = velocity(x, t, label), velocity(x, t, null)
        return combine(conditional, unconditional, scale, channels)

    if low <= 0.0 and high >= 1.0:
        return guided

    def guided_inside(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        inside = jnp.logical_and(t > low if low > 0.0 else True, t < high if high < 1.0 else True)
        return jax.lax.cond(inside, guided, velocity, x, t, label)

    return guided_inside
