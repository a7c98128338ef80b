"""Token choice without dropping, in plain XLA: sort the assignments by expert, then walk over them.

Rows are laid out in tiles (kernels/tiles.py). XLA wants static shapes, so the tiles of an expert
are taken in chunks: as many chunks of MAX_TILES as the expert fills, then one chunk of what is
left, 1 to MAX_TILES tiles. All chunks of one size are one loop whose body has static shapes. So an
expert with 260 rows costs 288 rows and not 512. A tile is an eighth of the average load. Smaller
tiles would waste fewer rows but need more loops to compile, and below about 128 rows XLA:CPU spends
the time of a product on packing the weight matrix.

Every chunk fetches its own tokens, so that they are still in the cache when they are used, and
writes its own rows. A padding row holds some token with the gate 0, which keeps it out of every
sum.

The gradient is our own. JAX's would turn the loops inside out and keep a copy of all weights for
every chunk. Ours saves the hidden pre-activations and is one more walk.

Memory traffic in elements, forward: 2 N D for the rows, 2-3 N H for the hidden values, and the
weights once for each chunk of an expert (once in all while its load is below 5/4 of the average).
Backward: 4 N D, 2-3 N H, and the weights and their gradients once for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import _combine, no_gradient
from moe_diffusion.kernels.tiles import TilePlan, plan_tiles

# Rows of a tile. A product of fewer rows than the first takes as long as one with that many; above
# the second, padding costs little.
MIN_TILE, MAX_TILE = 32, 128
MAX_TILES = 10  # in a chunk


def make_plan(
    token: jax.Array,
    expert: jax.Array,
    *,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
) -> TilePlan:
    """The plan of `plan_tiles`, with tiles of a size that suits `blocked`."""
    average = -(-expert.shape[0] // num_experts)
    return plan_tiles(
        token,
        expert,
        num_tokens=num_tokens,
        num_experts=num_experts,
        slots_per_token=slots_per_token,
        tile=min(MAX_TILE, max(MIN_TILE, -(-average // 8))),
    )


def blocked(
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    *,
    slots_per_token: int | None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """x[T, D], token, expert i32[N] (expert == E is unused), weight f32[N] -> y[T, D].

    slots_per_token: K where the list has K used assignments of each token in turn, else None.
    """
    plan = make_plan(
        token,
        expert,
        num_tokens=x.shape[0],
        num_experts=params["up"].shape[0],
        slots_per_token=slots_per_token,
    )
    return by_chunks(kind, x, weight, params, plan, dropout)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_chunks(
    kind: str,
    x: jax.Array,
    weight: jax.Array,
    params: Params,
    plan: TilePlan,
    dropout: Dropout | None = None,
) -> jax.Array:
    """x[T, D], weight f32[N], experts `params` -> y[T, D] = sum of weight * expert(x)."""
    return _forward(kind, x, weight, params, plan, dropout)[0]


def _walk(plan: TilePlan, chunk: Callable[..., Any], carry: Any) -> Any:
    """Visits all chunks in turn: carry = chunk(size, is_first, expert, row, carry).

    The chunk with what is left of an expert comes first (is_first); the full chunks of all experts
    come after that.
    """
    tiles = plan.end - plan.start
    most = min(
        MAX_TILES, plan.expert.shape[0] - plan.end.shape[0] + 1
    )  # tiles that an expert can have
    full = (tiles - 1) // most
    left = tiles - full * most  # 1 to `most`
    order = jnp.argsort(left)
    bounds = jnp.searchsorted(left[order], jnp.arange(1, most + 2))
    for count in range(1, most + 1):

        def last(n, carry, count=count):
            expert = order[n]
            row = (plan.end[expert] - count) * plan.tile
            return chunk(count * plan.tile, True, expert, row, carry)

        carry = lax.fori_loop(bounds[count - 1], bounds[count], last, carry)

    until = jnp.cumsum(full)

    def another(n, carry):
        expert = jnp.searchsorted(until, n, side="right")
        row = (plan.start[expert] + (n - until[expert] + full[expert]) * most) * plan.tile
        return chunk(most * plan.tile, False, expert, row, carry)

    return lax.fori_loop(0, until[-1], another, carry)


def _rows(array, row, size):
    return lax.dynamic_slice_in_dim(array, row, size, axis=0)


def _tokens(array, plan, row, size):
    return jnp.take(array, _rows(plan.rows.token, row, size), axis=0, mode="clip")


def _write(array, values, row):
    return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), row, axis=0)


def _weight_of_rows(weight, plan, dtype):
    return jnp.take(weight, plan.assignment, mode="fill", fill_value=0).astype(dtype)[:, None]


def _expert(params, index):
    return {k: lax.dynamic_index_in_dim(v, index, keepdims=False) for k, v in params.items()}


def _between(kind, dropout, token, expert):
    """Activation and dropout of rows that hold `token`: n arrays [M, H] -> [M, H]."""

    def between(*hidden):
        inner = mlp.activation(kind)(*hidden)
        return inner if dropout is None else dropout(inner, token, expert)

    return between


def _forward(kind, x, weight, params, plan, dropout):
    gate = _weight_of_rows(weight, plan, x.dtype)
    names = mlp.inputs(kind)

    def chunk(size, is_first, expert, row, carry):
        del is_first
        mine = _expert(params, expert)
        tokens = _tokens(x, plan, row, size)
        hidden = [mlp.project(tokens, mine, name) for name in names]
        inner = _between(kind, dropout, _rows(plan.rows.token, row, size), expert)(*hidden)
        out = mlp.project(inner, mine, "down") * _rows(gate, row, size)
        saved = [_write(*pair, row) for pair in zip(carry[0], hidden, strict=True)]
        return saved, _write(carry[1], out, row)

    num_rows = plan.assignment.shape[0]
    init = (
        [jnp.zeros((num_rows, params[name].shape[-1]), x.dtype) for name in names],
        jnp.zeros((num_rows, x.shape[1]), x.dtype),
    )
    hidden, out = _walk(plan, chunk, init)
    return _combine(out, plan.rows), (x, weight, params, plan, dropout, hidden)


def _backward(kind, residuals, d_y):
    x, weight, params, plan, dropout, hidden = residuals
    gate = _weight_of_rows(weight, plan, x.dtype)
    names = mlp.inputs(kind)

    def chunk(size, is_first, expert, row, carry):
        d_rows, d_gate, d_params = carry
        mine = _expert(params, expert)
        tokens, d_out = (_tokens(array, plan, row, size) for array in (x, d_y))
        gates, *inputs = (_rows(array, row, size) for array in (gate, *hidden))
        between = _between(kind, dropout, _rows(plan.rows.token, row, size), expert)
        inner, pull = jax.vjp(between, *inputs)
        d_inner = _matmul(d_out, mine["down"].T)
        # The gate's gradient <d_out, down(inner)> is <d_inner, inner>, which needs no down(inner).
        d_gates = (d_inner * inner).astype(jnp.float32).sum(-1)
        d_hidden = dict(zip(names, pull(gates * d_inner), strict=True))
        turned = lax.optimization_barrier(tokens.T)
        grads = {name: _matmul(turned, d, jnp.float32) for name, d in d_hidden.items()}
        grads["down"] = _outer(gates * inner, d_out)
        for name, d in d_hidden.items():
            if name + "_bias" in mine:
                grads[name + "_bias"] = d.astype(jnp.float32).sum(0)
        if "down_bias" in mine:
            d_gates += (d_out * mine["down_bias"]).astype(jnp.float32).sum(-1)
            grads["down_bias"] = (gates * d_out).astype(jnp.float32).sum(0)
        if not is_first:
            sums = _expert(d_params, expert)
            grads = {name: sums[name] + grad for name, grad in grads.items()}
        d_params = {
            name: lax.dynamic_update_index_in_dim(array, grads[name], expert, 0)
            for name, array in d_params.items()
        }
        d_tokens = sum(_matmul(d, mine[name].T) for name, d in d_hidden.items())
        return _write(d_rows, d_tokens, row), _write(d_gate, d_gates, row), d_params

    num_rows = plan.assignment.shape[0]
    init = (
        jnp.zeros((num_rows, x.shape[1]), x.dtype),
        jnp.zeros(num_rows, jnp.float32),
        {name: jnp.zeros(array.shape, jnp.float32) for name, array in params.items()},
    )
    d_rows, d_gate, d_params = _walk(plan, chunk, init)
    d_params = {name: array.astype(params[name].dtype) for name, array in d_params.items()}
    d_weight = jnp.take(d_gate, plan.row, mode="fill", fill_value=0)
    return _combine(d_rows, plan.rows), d_weight, d_params, *no_gradient((plan, dropout))


def _matmul(a, b, dtype=None):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype or a.dtype)


def _outer(a, b):
    """a^T b in f32. XLA:CPU is faster if it transposes first than if it multiplies columns."""
    return _matmul(lax.optimization_barrier(a.T), b, jnp.float32)


by_chunks.defvjp(_forward, _backward)
