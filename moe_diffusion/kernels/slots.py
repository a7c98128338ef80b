"""Experts with equally many slots: one batched product [E, C, D] x [E, D, H] for each projection.

Nothing is sorted, and XLA runs batched products well. Memory traffic in elements, with N = E C:
2 N D for the rows in and out, N H (twice for a SwiGLU) for the hidden values, 2-3 E D H for the
weights.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import combine, gather, plan_rows


def fixed_slots(
    x: jax.Array,
    token: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    dropout: Dropout | None = None,
) -> jax.Array:
    """x[T, D], token i32[E, C] (T or more in an empty slot), weight f32[E, C] -> [T, D]."""
    num_experts, slots = token.shape
    plan = plan_rows(token.reshape(-1), num_tokens=x.shape[0])
    rows = gather(x, plan).reshape(num_experts, slots, x.shape[1])
    drop = None
    if dropout is not None:
        drop = partial(dropout, token=token, expert=jnp.arange(num_experts)[:, None])
    out = mlp.apply(rows, params, kind, drop) * weight[..., None].astype(x.dtype)
    return combine(out.reshape(num_experts * slots, x.shape[1]), plan)
