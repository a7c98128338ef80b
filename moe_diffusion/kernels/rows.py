"""From tokens to rows and back: the two data movements of a dispatch.

An assignment sends one token to one expert. Its row is its place in the list that the experts read.
`gather` copies tokens to rows, and `combine` adds up the rows of each token. Each is the gradient
of the other, so neither needs a scatter-add, which is slow on TPU and adds in no fixed order on
GPU.
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

    token:  i32[R]   the token in each row; num_tokens or more marks a row that holds none
    row:    i32[N]   the used rows, grouped by token
    first:  i32[T]   where the rows of each token begin in `row`
    count:  i32[T]   how many rows each token has
    per_token: that number if it is the same for all tokens and known beforehand, else None
    """

    token: jax.Array
    row: jax.Array
    first: jax.Array
    count: jax.Array
    per_token: int | None = flax.struct.field(pytree_node=False, default=None)


def stable_order(values: jax.Array, bound: int) -> jax.Array:
    """The stable argsort i32[N] of integers [N] in [0, bound).

    Where value and place fit into 32 bits together, they are sorted as one number. This is five
    times as fast on CPU as sorting pairs, and moves half as much elsewhere.
    """
    num = values.shape[0]
    if num * bound > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(values, stable=True).astype(jnp.int32)
    packed = values.astype(jnp.int32) * num + jnp.arange(num, dtype=jnp.int32)
    return lax.sort(packed, is_stable=False) % num


def plan_rows(token: jax.Array, num_tokens: int) -> RowPlan:
    """The plan of rows that hold token i32[R], in any order; num_tokens or more in unused rows."""
    row = stable_order(jnp.minimum(token, num_tokens), num_tokens + 1)
    bounds = jnp.searchsorted(token[row], jnp.arange(num_tokens + 1, dtype=token.dtype))
    bounds = bounds.astype(jnp.int32)
    return RowPlan(token=token, row=row, first=bounds[:-1], count=jnp.diff(bounds))


def token_major(token: jax.Array, row: jax.Array, num_tokens: int, per_token: int) -> RowPlan:
    """The plan of rows that hold token i32[R] where every token has `per_token` rows.

    row i32[N]: the rows of token 0, then those of token 1, and so on.
    """
    first = jnp.arange(num_tokens, dtype=jnp.int32) * per_token
    count = jnp.full(num_tokens, per_token, jnp.int32)
    return RowPlan(token, row, first, count, per_token=per_token)


@jax.custom_vjp
def gather(x: jax.Array, plan: RowPlan) -> jax.Array:
    """x[T, D] -> rows[R, D]; unused rows are zero."""
    return _gather(x, plan)


@jax.custom_vjp
def combine(rows: jax.Array, plan: RowPlan) -> jax.Array:
    """rows[R, D] -> x[T, D]: the sum of each token's rows, taken in f32; zero without rows."""
    return _combine(rows, plan)


def _gather(x, plan):
    return jnp.take(x, plan.token, axis=0, mode="fill", fill_value=0)


def _combine(rows, plan):
    def nth(n):
        """The n-th row of every token; zero where a token has fewer."""
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
    """The cotangent of a pytree of integers: JAX wants zeros of type float0."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


gather.defvjp(
    lambda x, plan: (_gather(x, plan), plan),
    lambda plan, d_rows: (_combine(d_rows, plan), no_gradient(plan)),
)
combine.defvjp(
    lambda rows, plan: (_combine(rows, plan), plan),
    lambda plan, d_x: (_gather(d_x, plan), no_gradient(plan)),
)
