"""The dispatch around grouped kernels and its gradient, the same for every platform.

    hidden = up(x[token])  [, gate(x[token])]        out = down(act(hidden))
    y[t]   = sum over the rows r of token t of weight[r] * out[r]

A platform supplies three kernels (`Kernels`). The one custom_vjp here strings them together. For
the backward pass it saves only the hidden pre-activations.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import _combine, no_gradient
from moe_diffusion.kernels.tiles import TilePlan, plan_tiles

Hidden = tuple[jax.Array, ...]


class Kernels(Protocol):
    """Three grouped kernels over R rows, in tiles of one expert each (`TilePlan`).

    The plan's token i32[R] says which row of an array [T, D] a kernel reads; T or more means a row
    of zeros. Padding rows and rows beyond the used tiles come out as zeros.
    """

    def forward(
        self, kind: str, x: jax.Array, weight: jax.Array, params: Params, plan: TilePlan, save: bool
    ) -> tuple[jax.Array, Hidden]:
        """x[T, D], weight f32[R] -> weight * down(act(hidden)) [R, D], saved.

        saved: with `save` the hidden pre-activations [R, H] of each projection in, else ().
        """

    def backward(
        self,
        kind: str,
        d_y: jax.Array,
        weight: jax.Array,
        hidden: Hidden,
        params: Params,
        plan: TilePlan,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Hidden]:
        """d_y[T, D] -> what the gradients are made of.

        Returns the gradients of the rows [R, D] and of weight f32[R], weight * act(hidden) [R, H],
        and the gradients of hidden [R, H].
        """

    def outer(
        self, left: jax.Array, right: jax.Array, plan: TilePlan, *, gather: str | None
    ) -> jax.Array:
        """The sum over each expert's rows of left[r]^T right[r]: [R, I], [R, O] -> f32[E, I, O].

        gather: "left" or "right" is an array [T, ...] whose rows the plan's tokens name.
        """

    def plan(self, token: jax.Array, expert: jax.Array, **sizes) -> TilePlan:
        """Sorts assignments into tiles, see `plan_tiles`."""
        return plan_tiles(token, expert, **sizes)

    def outers(
        self, left: jax.Array, rights: Hidden, plan: TilePlan, *, gather: str | None
    ) -> list[jax.Array]:
        """`outer` with each of several right operands."""
        return [self.outer(left, right, plan, gather=gather) for right in rights]

    def combine(self, rows: jax.Array, plan: TilePlan) -> jax.Array:
        """Adds up the rows of each token, as forward or backward made them: [R, D] -> [T, D]."""
        return _combine(rows, plan.rows)


def sorted_by_expert(
    kernels: Kernels,
    tile: int,
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    slots_per_token: int | None,
) -> jax.Array:
    """Computes any list of assignments and drops none.

    Args:
      tile: the number of rows of a tile.
      x: [T, D].
      token, expert: i32[N]; expert == E marks an unused assignment.
      weight: f32[N].
      slots_per_token: K if every token has K used assignments, one token after the other.

    Returns:
      y [T, D] in x's dtype.
    """
    plan = kernels.plan(
        token,
        expert,
        num_tokens=x.shape[0],
        num_experts=params["up"].shape[0],
        slots_per_token=slots_per_token,
        tile=tile,
    )
    return grouped(kernels, kind, x, weight, params, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(
    kernels: Kernels,
    kind: str,
    x: jax.Array,
    weight: jax.Array,
    params: Params,
    plan: TilePlan,
) -> jax.Array:
    """x[T, D], weight f32[N], experts `params` -> y[T, D] = sum of weight * expert(x)."""
    out, _ = kernels.forward(kind, x, _row_weight(weight, plan), params, plan, save=False)
    return kernels.combine(out, plan)


def _row_weight(weight: jax.Array, plan: TilePlan) -> jax.Array:
    return jnp.take(weight, plan.assignment, mode="fill", fill_value=0)


def _forward(kernels, kind, x, weight, params, plan):
    out, hidden = kernels.forward(kind, x, _row_weight(weight, plan), params, plan, save=True)
    return kernels.combine(out, plan), (x, weight, params, plan, hidden)


def _backward(kernels, kind, residuals, d_y):
    x, weight, params, plan, hidden = residuals
    row_weight = _row_weight(weight, plan)
    d_rows, d_gate, inner, d_hidden = kernels.backward(kind, d_y, row_weight, hidden, params, plan)
    grads = {"down": kernels.outer(inner, d_y, plan, gather="right")}
    names = mlp.inputs(kind)
    grads |= zip(names, kernels.outers(x, d_hidden, plan, gather="left"), strict=True)
    for name, gradient in zip(names, d_hidden, strict=True):
        if name + "_bias" in params:
            grads[name + "_bias"] = _sum_rows(gradient, plan, params[name].shape[0])
    if "down_bias" in params:
        d_out = jnp.take(d_y, plan.rows.token, axis=0, mode="fill", fill_value=0)
        grads["down_bias"] = _sum_rows(row_weight[:, None] * d_out, plan, params["down"].shape[0])
    grads = {name: value.astype(params[name].dtype) for name, value in grads.items()}
    d_weight = jnp.take(d_gate, plan.row, mode="fill", fill_value=0).astype(weight.dtype)
    return kernels.combine(d_rows, plan), d_weight, grads, no_gradient(plan)


def _sum_rows(values: jax.Array, plan: TilePlan, num_experts: int) -> jax.Array:
    """The sum of each expert's rows, [R, H] -> f32[E, H], tile by tile and without a scatter."""
    tiles = values.astype(jnp.float32).reshape(plan.expert.shape[0], plan.tile, -1).sum(1)
    member = jax.nn.one_hot(plan.expert, num_experts, axis=0, dtype=jnp.float32)
    return jnp.matmul(member, tiles, precision=jax.lax.Precision.HIGHEST)


grouped.defvjp(_forward, _backward)
