"""Rows for experts, and back: the two data movements of a dispatch, each the other's transpose.

An assignment sends one token to one expert; its row is its place in the list that the experts
read. `gather` copies tokens to rows, `combine` adds a token's rows up again. The gradient of one
is the other, so neither direction ever needs a scatter-add, which is slow on TPU and adds in no
fixed order on GPU.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@flax.struct.dataclass
class RowPlan:
    """Which token each row holds, and which rows each token has; integers only.

    token:  i32[R]   token of a row; num_tokens or more marks a row that nobody uses
    row:    i32[N]   the used rows, grouped by token
    first:  i32[T]   a token's first place in `row`
    count:  i32[T]   how many rows a token has
    per_token: the number of rows of every token where all have equally many, else None
    """

    token: jax.Array
    row: jax.Array
    first: jax.Array
    count: jax.Array
    per_token: int | None = flax.struct.field(pytree_node=False, default=None)


def stable_order(values: jax.Array, bound: int) -> jax.Array:
    """argsort i32[N] of integers [N] in [0, bound), equal ones in their order.

    Value and place are sorted as one number where both fit into 32 bits: on CPU five times as fast
    as sorting pairs, and half the traffic elsewhere.
    """
    num = values.shape[0]
    if num * bound > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(values, stable=True).astype(jnp.int32)
    packed = values.astype(jnp.int32) * num + jnp.arange(num, dtype=jnp.int32)
    return lax.sort(packed, is_stable=False) % num


def plan_rows(token: jax.Array, num_tokens: int) -> RowPlan:
    """RowPlan of rows that hold token i32[R] in any order; unused rows hold num_tokens or more."""
    row = stable_order(jnp.minimum(token, num_tokens), num_tokens + 1)
    bounds = jnp.searchsorted(token[row], jnp.arange(num_tokens + 1, dtype=token.dtype))
    bounds = bounds.astype(jnp.int32)
    return RowPlan(token=token, row=row, first=bounds[:-1], count=jnp.diff(bounds))


def token_major(token: jax.Array, row: jax.Array, num_tokens: int, per_token: int) -> RowPlan:
    """RowPlan of rows that hold token i32[R], where every token has as many, one after the other
    in row i32[N]."""
    first = jnp.arange(num_tokens, dtype=jnp.int32) * per_token
    count = jnp.full(num_tokens, per_token, jnp.int32)
    return RowPlan(token, row, first, count, per_token=per_token)


@jax.custom_vjp
def gather(x: jax.Array, plan: RowPlan) -> jax.Array:
    """x[T, D] -> rows[R, D]; unused rows are zero."""
    return _gather(x, plan)


@jax.custom_vjp
def combine(rows: jax.Array, plan: RowPlan) -> jax.Array:
    """rows[R, D] -> x[T, D]: the sum of every token's rows, in f32; zero for a token with none."""
    return _combine(rows, plan)


def _gather(x, plan):
    return jnp.take(x, plan.token, axis=0, mode="fill", fill_value=0)


def _combine(rows, plan):
    def nth(n):
        """Every token's n-th row, zero where it has fewer."""
        place = jnp.minimum(plan.first + n, plan.row.shape[0] - 1)
        found = jnp.take(rows, plan.row[place], axis=0, mode="clip").astype(jnp.float32)
        return found if plan.per_token else jnp.where((n < plan.count)[:, None], found, 0.0)

    if plan.per_token:
        total = sum(nth(n) for n in range(plan.per_token))
    else:
        zero = jnp.zeros((plan.first.shape[0], rows.shape[1]), jnp.float32)
        total = lax.fori_loop(0, plan.count.max(), lambda n, total: total + nth(n), zero)
    return total.astype(rows.dtype)


def no_gradient(tree):
    """The cotangent of a pytree of integers, which JAX wants as float0 zeros."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


gather.defvjp(
    lambda x, plan: (_gather(x, plan), plan),
    lambda plan, d_rows: (_combine(d_rows, plan), no_gradient(plan)),
)
combine.defvjp(
    lambda rows, plan: (_combine(rows, plan), plan),
    lambda plan, d_x: (_gather(d_x, plan), no_gradient(plan)),
)
