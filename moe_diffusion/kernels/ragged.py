"""XLA's grouped product `jax.lax.ragged_dot`, as a measure for our kernels.

No config should use it, because JAX differentiates it badly: the gradient of the weights is dense
on TPU (E times the arithmetic), every gradient is dense on GPU, and on CPU an array [E, R, D]
appears.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import combine, gather, plan_rows


def ragged_dot(
    x: jax.Array, token: jax.Array, expert: jax.Array, weight: jax.Array, params: Params, kind: str
) -> jax.Array:
    """x[T, D], token, expert i32[N] (expert == E is unused), weight f32[N] -> [T, D]."""
    product = partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
    return grouped_products(x, token, expert, weight, params, kind, product=product)


def grouped_products(
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    *,
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The same by any grouped product: (rows [R, I], weights [E, I, O], rows of each expert i32[E])
    -> [R, O]."""
    num_experts = params["up"].shape[0]
    order = jnp.argsort(expert, stable=True)
    sorted_expert = expert[order]
    bounds = jnp.searchsorted(sorted_expert, jnp.arange(num_experts + 1))
    sizes = jnp.diff(bounds).astype(jnp.int32)
    used = sorted_expert < num_experts
    owner = jnp.minimum(sorted_expert, num_experts - 1)

    def project(rows, name):
        y = product(rows, params[name], sizes)
        bias = params.get(name + "_bias")
        return (y if bias is None else y + bias[owner]).astype(x.dtype)

    plan = plan_rows(jnp.where(used, token[order], x.shape[0]), x.shape[0])
    rows = gather(x, plan)
    hidden = mlp.activation(kind)(*(project(rows, name) for name in mlp.inputs(kind)))
    out = project(hidden, "down") * jnp.where(used, weight[order], 0)[:, None].astype(x.dtype)
    return combine(out, plan)
