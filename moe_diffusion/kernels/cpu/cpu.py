"""C++ kernels of the experts for CPUs, f32 (cpu.cc, library.py).

Rows are sorted by expert, without padding. A thread takes up to 224 rows of one expert. Any fast
product first copies its operands to where it reads them; here that copy also gathers the rows, so
gathering costs nothing. Where every token has one expert, a result is written straight to its
token's place, which costs nothing either: that place is fetched into the cache while the result is
being computed. XLA:CPU runs products of few rows at half the speed of large ones and spends a fixed
20 to 50 microseconds on each; these kernels do neither.

Traffic in elements for R rows, n = 2 projections in (SwiGLU) or 1, in blocks of 512 columns:
forward 2 R D + (2 n + 2) R H, backward 4 R D + (5 n + 6) R H. Both directions also read the weights
once for every 224 rows of an expert, and the backward pass writes their gradients. Each thread
keeps up to 0.8 MB of copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.cpu.library import OUTER_PRODUCTS, PLAN, ROW_PRODUCTS
from moe_diffusion.kernels.grouped import Kernels, grouped, sorted_by_expert
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import plan_rows, token_major
from moe_diffusion.kernels.tiles import TilePlan, fixed_tiles, num_tiles


def cpu(
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    *,
    slots_per_token: int | None,
) -> jax.Array:
    """Any list of assignments; arguments and result as in `grouped.sorted_by_expert`.

    Like everything in this file it works only where `library.available()` is true.
    """
    kernels, arrays = CPUKernels(), (x, token, expert, weight)
    return sorted_by_expert(kernels, 1, *arrays, params, kind, slots_per_token)


def cpu_slots(
    x: jax.Array, token: jax.Array, weight: jax.Array, params: Params, kind: str
) -> jax.Array:
    """x[T, D], token i32[E, C] (T or more in an empty slot), weight f32[E, C] -> [T, D]."""
    plan = fixed_tiles(token, num_tokens=x.shape[0], tile=1)
    return grouped(CPUKernels(), kind, x, weight.reshape(-1), params, plan)


def make_plan(
    token: jax.Array,
    expert: jax.Array,
    *,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
) -> TilePlan:
    """The plan that `plan_tiles` makes with tiles of one row, made by counting, not by sorting."""
    num, total = expert.shape[0], num_tiles(expert.shape[0], num_experts, 1)
    sizes = (total, total, total, num, num_experts, num_experts)
    results = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes]
    given = token.astype(jnp.int32), expert.astype(jnp.int32)
    row_token, assignment, owner, row, start, end = _call(
        PLAN, results, *given, num_tokens=num_tokens
    )
    if slots_per_token:
        rows = token_major(row_token, row, num_tokens, slots_per_token)
    else:
        rows = plan_rows(row_token, num_tokens)
    return TilePlan(rows, assignment, row, owner, end[-1:], start, end, tile=1)


class CPUKernels(Kernels):
    """The three kernels of `grouped.Kernels`, for plans with tiles of one row.

    suffix: what `library.register` appended to the functions' names.
    """

    def __init__(self, suffix: str = ""):
        self.suffix = suffix

    def plan(self, token, expert, *, tile, **sizes):
        del tile  # is 1
        return make_plan(token, expert, **sizes)

    def forward(self, kind, x, weight, params, plan, save):
        names = mlp.inputs(kind)
        weights = [params[name] for name in names]
        biases = [params[name + "_bias"] for name in names if name + "_bias" in params]
        hidden = self._rows(plan, [x], weights, biases, gather=True)
        inner = mlp.activation(kind)(*hidden)
        bias = [params["down_bias"]] if "down_bias" in params else []
        (out,) = self._rows(
            plan, [inner], [params["down"]], bias, scale=weight, in_place=_in_place(plan)
        )
        return out, tuple(hidden) if save else ()

    def backward(self, kind, d_y, weight, hidden, params, plan):
        inner, pull = jax.vjp(mlp.activation(kind), *hidden)
        (d_inner,) = self._rows(plan, [d_y], [params["down"]], gather=True, turned=True)
        d_weight = (d_inner * inner).sum(-1)
        if "down_bias" in params:
            (by_bias,) = self._rows(plan, [d_y], [params["down_bias"][..., None]], gather=True)
            d_weight += by_bias[:, 0]
        d_hidden = pull(weight[:, None] * d_inner)
        weights = [params[name] for name in mlp.inputs(kind)]
        (d_rows,) = self._rows(plan, d_hidden, weights, turned=True, in_place=_in_place(plan))
        return d_rows, d_weight, weight[:, None] * inner, d_hidden

    def outer(self, left, right, plan, *, gather):
        return self.outers(left, [right], plan, gather=gather)[0]

    def outers(self, left, rights, plan, *, gather):
        """One call for all of them, so that the left operand is copied once."""
        shapes = [(plan.start.shape[0], left.shape[1], right.shape[1]) for right in rights]
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        operands = (plan.rows.token, plan.start, plan.end, left, *rights)
        gathered = {f"gather_{side}": gather == side for side in ("left", "right")}
        return _call(OUTER_PRODUCTS + self.suffix, results, *operands, **gathered)

    def combine(self, rows, plan):
        return rows if _in_place(plan) else super().combine(rows, plan)

    def _rows(
        self,
        plan: TilePlan,
        lefts: Sequence[jax.Array],
        weights: Sequence[jax.Array],
        biases: Sequence[jax.Array] = (),
        *,
        scale: jax.Array | None = None,
        gather: bool = False,
        turned: bool = False,
        in_place: bool = False,
    ) -> list[jax.Array]:
        """Rows times their experts' weights.

        One left operand gives one result for each of the weights. Several give one result, the sum
        of lefts[i] weights[i].

        Args:
          lefts: [R, I] each; with `gather` [T, I], whose rows the plan's tokens name.
          weights: [E, I, O] each; with `turned` [E, O, I].
          biases: [E, O] each, added to the result of the same number.
          scale: f32[R], multiplies the rows of the result.
          in_place: write each row where its token stands; every token must have exactly one row.

        Returns:
          [R, O] each; with `in_place` [T, O].
        """
        num_rows = plan.rows.first.shape[0] if in_place else plan.assignment.shape[0]
        result = jax.ShapeDtypeStruct((num_rows, weights[0].shape[1 if turned else 2]), jnp.float32)
        num = len(weights) if len(lefts) == 1 else 1
        # What is absent is left out: jaxlib 0.11.2 crashes on empty arrays in shard_map.
        operands = (*list(lefts) * num, *weights, *biases, *([] if scale is None else [scale]))
        return _call(
            ROW_PRODUCTS + self.suffix,
            [result] * num,
            *(plan.rows.token, plan.start, plan.end),
            *operands,
            gather=gather,
            in_place=in_place,
            turned=turned,
            bias=bool(biases),
            scaled=scale is not None,
        )


def _in_place(plan: TilePlan) -> bool:
    """Whether every token has one row, so that this row is already the token's sum."""
    return plan.rows.per_token == 1


def _call(function: str, results: list[jax.ShapeDtypeStruct], *operands, **attributes):
    call = jax.ffi.ffi_call(function, results, vmap_method="sequential")
    return call(*operands, **attributes)
