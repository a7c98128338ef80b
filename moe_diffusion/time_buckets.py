"""A loss by the time of its samples: how well a network does near the noise, and near the data.

Time 0 is noise and 1 is data. It is cut into `NUM` equal buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NUM = 5
NAME = "error_by_time"  # of the metric


def averages(
    time: jax.Array, errors: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The mean of each error, and the metric `NAME` of their sum.

    That is f32[2, NUM], for each bucket the sum over its samples and how many it has. Sums and not
    means, so that those of micro-batches can be averaged whatever samples they have.

    Args:
      time: f32[B] in [0, 1].
      errors: name -> f32[B].
    """
    means = {name: jnp.mean(error) for name, error in errors.items()}
    total = lax.stop_gradient(sum(errors.values())).astype(jnp.float32)
    places = jnp.clip(jnp.floor(time * NUM), 0, NUM - 1)
    inside = places[:, None] == jnp.arange(NUM)
    # Not a product: the NaN of one sample would be in all buckets.
    table = jnp.where(inside, jnp.stack([total, jnp.ones_like(total)])[:, :, None], 0.0).sum(1)
    return means, {NAME: table}


def spread(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with a mean for each bucket, "error_by_time/0.0-0.2", in the place of the sums.

    That of a bucket without samples is NaN.
    """
    found = {name: value for name, value in metrics.items() if name != NAME}
    if NAME in metrics:
        total, count = np.asarray(metrics[NAME], np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = total / count
        ends = np.arange(NUM + 1) / NUM
        names = (f"{NAME}/{a:.1f}-{b:.1f}" for a, b in zip(ends[:-1], ends[1:], strict=True))
        found |= dict(zip(names, means.tolist(), strict=True))
    return found
