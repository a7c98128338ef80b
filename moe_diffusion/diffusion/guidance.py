"""Classifier-free guidance (arXiv 2207.12598) around any prediction of a network.

v = v_null + scale * (v_cond - v_null)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Cond = Mapping[str, jax.Array]
# (x [B, H, W, C], t scalar f32, cond {field: [B, ...]}) -> [B, H, W, C_out]
Prediction = Callable[[jax.Array, jax.Array, Cond], jax.Array]


def guide(predict: Prediction, null: Callable[[Cond], Any], sampling: ConfigDict) -> Prediction:
    """Wraps `predict` with guidance; `cfg` 1 returns it as it is, at no extra cost.

    Args:
      null: cond -> the condition of the unconditional prediction, as `model.null` makes it.
      sampling: the section of a config, of which this function reads:

        * cfg: the scale.
        * cfg_interval: guidance acts where low < t < high, strictly (arXiv 2404.07724). Elsewhere
          the unconditional pass is not computed. An end at 0 or 1 is no bound, so that the default
          also guides the evaluations at t=0 and, for Heun, at t=1.
        * cfg_channels: only the first so many channels are guided, the others stay those of the
          conditional prediction. It is 3 in the `forward_with_cfg` of DiT and its descendants. 0
          guides as many as x has, which leaves out the variance that a DDPM network adds.
        * joint: one forward pass of both predictions, as `forward_with_cfg`, instead of two. The
          choice matters to routers that pool a batch: jointly, both predictions of an image compete
          for the same experts. They are neighbours in the batch, so that any part of it holds both
          predictions of the same images.
    """
    if sampling.cfg == 1.0:
        return predict
    low, high = sampling.cfg_interval

    def guided(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        cond, absent = dict(cond), dict(null(cond))
        if sampling.joint:
            x_twice, cond_twice = jax.tree.map(_interleaved, (x, cond), (x, absent))
            both = predict(x_twice, t, cond_twice)
            both = both.reshape(len(x), 2, *both.shape[1:])
            conditional, unconditional = both[:, 0], both[:, 1]
        else:
            conditional, unconditional = predict(x, t, cond), predict(x, t, absent)
        away = unconditional + sampling.cfg * (conditional - unconditional)
        channels = sampling.cfg_channels or x.shape[-1]
        return jnp.concatenate([away[..., :channels], conditional[..., channels:]], axis=-1)

    if low <= 0.0 and high >= 1.0:
        return guided

    def guided_inside(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        inside = jnp.logical_and(t > low if low > 0.0 else True, t < high if high < 1.0 else True)
        return jax.lax.cond(inside, guided, predict, x, t, dict(cond))

    return guided_inside


def _interleaved(a: jax.Array, b: jax.Array) -> jax.Array:
    """a[0], b[0], a[1], b[1], ... of two arrays [B, ...]."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
