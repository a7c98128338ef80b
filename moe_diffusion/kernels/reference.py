"""The oracle of the tests: every expert computes every token, and a dense gate matrix picks.

It takes E / K times the arithmetic of a dispatch, JAX differentiates it, and it is too simple to be
wrong.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.mlp import Params


def reference(
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    dropout: Dropout | None = None,
) -> jax.Array:
    """y[t] = sum of weight[n] * expert[n](x[t]) over the assignments n with token[n] == t.

    x [T, D]; token, expert i32[N] and weight f32[N] (expert == E is unused); returns [T, D].
    """
    num_tokens, num_experts = x.shape[0], params["up"].shape[0]
    gates = jnp.zeros((num_tokens, num_experts + 1), jnp.float32).at[token, expert].add(weight)
    drop = None
    if dropout is not None:
        token, expert = jnp.arange(num_tokens), jnp.arange(num_experts)[:, None]
        drop = partial(dropout, token=token, expert=expert)
    outputs = mlp.apply(x[None], params, kind, drop)  # [E, T, D]
    y = jnp.einsum("te,etd->td", gates[:, :-1], outputs.astype(jnp.float32))
    return y.astype(x.dtype)
