"""Pallas TPU kernels of the experts: one pass over sorted rows for each direction.

Every kernel walks over tiles whose rows all have one expert (`TilePlan`). The tile's expert id is
prefetched and picks the block of weights, which stays in VMEM until the expert changes. Up
projection, activation and down projection are one kernel, so of what lies between them only the
pre-activations that the backward pass needs leave VMEM. If the hidden width is too large for VMEM,
the kernels walk over blocks of it inside a tile.

Traffic in elements for R rows, n = 2 projections in (SwiGLU) or 1, V = visits of an expert's
weights (1 per expert if H is one block, else 1 per tile):

    forward    2 R D + n R H       + V (n + 1) D H     (inference: without n R H)
    backward   2 R D + (2 n + 1) R H + V (n + 1) D H
    outer      R (I + O) for each block of the other's width, E I O out

XLA gathers the rows beforehand, because it fuses nothing into a kernel: R D more to write and to
read. As an option the forward kernel fetches them itself (`TPUKernels(gather=True)`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.grouped import Kernels, grouped, sorted_by_expert
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.tiles import TilePlan, fixed_tiles
from moe_diffusion.kernels.tpu.tpu_bodies import (
    LANES,
    backward_kernel,
    fetching_kernel,
    forward_kernel,
    outer_kernel,
)
from moe_diffusion.kernels.tuning import tpu_tiles


def tpu(
    x: jax.Array,
    token: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    *,
    slots_per_token: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Any list of assignments; arguments and result as in `grouped.sorted_by_expert`.

    interpret: run the kernels on a CPU, for tests.
    """
    sizes = tpu_tiles(params, token.shape[0])
    kernels, arrays = TPUKernels(sizes.hidden, interpret=interpret), (x, token, expert, weight)
    return sorted_by_expert(kernels, sizes.rows, *arrays, params, kind, slots_per_token)


def tpu_slots(
    x: jax.Array,
    token: jax.Array,
    weight: jax.Array,
    params: Params,
    kind: str,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x[T, D], token i32[E, C] (T or more in an empty slot), weight f32[E, C] -> [T, D]."""
    sizes = tpu_tiles(params, token.size, slots=token.shape[1])
    plan = fixed_tiles(token, num_tokens=x.shape[0], tile=sizes.rows)
    kernels = TPUKernels(sizes.hidden, interpret=interpret)
    return grouped(kernels, kind, x, weight.reshape(-1), params, plan)


class TPUKernels(Kernels):
    """The three kernels of `grouped.Kernels`.

    block_h: hidden columns at a time.
    gather: the forward kernel fetches the rows from HBM itself, with one transfer for each row, two
      tiles ahead of the products.
    interpret: run on a CPU, for tests.
    """

    def __init__(self, block_h: int, gather: bool = False, interpret: bool = False):
        self.block_h, self.gather, self.interpret = block_h, gather, interpret

    def forward(self, kind, x, weight, params, plan, save):
        names = mlp.inputs(kind)
        saved = names if save else ()
        width, hidden = params["up"].shape[1:]
        grid = _Grid(plan, width, hidden, self.block_h)
        weights, specs = grid.weights(params, names)
        num_rows = plan.assignment.shape[0]
        kernel = partial(forward_kernel, kind=kind, grid=grid, biased="down_bias" in params)
        scratch = [pltpu.VMEM((plan.tile, width), jnp.float32)]
        if self.gather:
            rows, row_specs, more = _fetched(x, plan)
            kernel, scratch = partial(fetching_kernel, kernel=kernel), scratch + more
        else:
            rows, row_specs = [_gather(x, plan)], [grid.rows(width)]
        out = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(grid.tiles, grid.blocks),
                in_specs=[*row_specs, grid.per_row(), *specs],
                out_specs=[grid.rows(width), *(grid.hidden() for _ in saved)],
                scratch_shapes=scratch,
            ),
            out_shape=[
                jax.ShapeDtypeStruct((num_rows, width), x.dtype),
                *(jax.ShapeDtypeStruct((num_rows, hidden), x.dtype) for _ in saved),
            ],
            compiler_params=grid.compiler_params(),
            cost_estimate=grid.cost(x.dtype, len(names) + 1, num_hidden=len(saved)),
            interpret=self.interpret,
            name="moe_forward",
        )(plan.expert, plan.used, *rows, grid.row_values(weight), *weights)
        return out[0], tuple(out[1:])

    def backward(self, kind, d_y, weight, hidden, params, plan):
        names = mlp.inputs(kind)
        d_out = _gather(d_y, plan)
        width, size = params["up"].shape[1:]
        grid = _Grid(plan, width, size, self.block_h)
        weights, specs = grid.weights({k: v for k, v in params.items() if "_bias" not in k}, names)
        if "down_bias" in params:
            weights, specs = [*weights, params["down_bias"][:, None]], [*specs, grid.down_bias()]
        hidden_shape = jax.ShapeDtypeStruct(hidden[0].shape, hidden[0].dtype)
        d_rows, d_weight, inner, *d_hidden = pl.pallas_call(
            partial(backward_kernel, kind=kind, grid=grid, biased="down_bias" in params),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(grid.tiles, grid.blocks),
                in_specs=[
                    grid.rows(width),
                    grid.per_row(),
                    *(grid.hidden() for _ in names),
                    *specs,
                ],
                out_specs=[
                    grid.rows(width),
                    grid.per_row(),
                    *(grid.hidden() for _ in range(len(names) + 1)),
                ],
                scratch_shapes=[
                    pltpu.VMEM((plan.tile, width), jnp.float32),
                    pltpu.VMEM((plan.tile, LANES), jnp.float32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(d_out.shape, d_y.dtype),
                jax.ShapeDtypeStruct((grid.tiles, 1, plan.tile), jnp.float32),
                *(hidden_shape for _ in range(len(names) + 1)),
            ],
            compiler_params=grid.compiler_params(),
            cost_estimate=grid.cost(d_out.dtype, len(names) + 1, num_hidden=2 * len(names) + 1),
            interpret=self.interpret,
            name="moe_backward",
        )(plan.expert, plan.used, d_out, grid.row_values(weight), *hidden, *weights)
        return d_rows, d_weight.reshape(-1), inner, tuple(d_hidden)

    def outer(self, left, right, plan, *, gather):
        left = _gather(left, plan) if gather == "left" else left
        right = _gather(right, plan) if gather == "right" else right
        num_experts = plan.start.shape[0]
        (rows, width), columns = left.shape, right.shape[1]
        block_i, block_o = _outer_block(width), _outer_block(columns)
        return pl.pallas_call(
            outer_kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(pl.cdiv(width, block_i), pl.cdiv(columns, block_o), rows // plan.tile),
                in_specs=[
                    pl.BlockSpec((plan.tile, block_i), lambda i, o, t, *_: (t, i)),
                    pl.BlockSpec((plan.tile, block_o), lambda i, o, t, *_: (t, o)),
                ],
                out_specs=pl.BlockSpec(
                    (1, block_i, block_o), lambda i, o, t, expert, used: (expert[t], i, o)
                ),
            ),
            out_shape=jax.ShapeDtypeStruct((num_experts, width, columns), jnp.float32),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * width * columns,
                bytes_accessed=left.size * left.dtype.itemsize * pl.cdiv(columns, block_o)
                + right.size * right.dtype.itemsize * pl.cdiv(width, block_i)
                + 4 * num_experts * width * columns,
                transcendentals=0,
            ),
            interpret=self.interpret,
            name="moe_outer",
        )(plan.expert, plan.used, left, right)


VMEM_LIMIT = 64 << 20


def _gather(x, plan):
    return jnp.take(x, plan.rows.token, axis=0, mode="fill", fill_value=0)


def _outer_block(width: int) -> int:
    """How many columns a block of a gradient has: all if there are at most 1,024, else 512."""
    return width if width <= 1024 else 512


class _Grid:
    """Block shapes and index maps shared by the forward and the backward kernel.

    The grid is (tiles, blocks of H). A slack tile asks for the block that was fetched last, which
    costs no transfer.
    """

    def __init__(self, plan: TilePlan, width: int, hidden: int, block_h: int):
        self.plan, self.width, self.size = plan, width, hidden
        self.block = min(block_h, hidden)
        self.tiles, self.blocks = plan.expert.shape[0], pl.cdiv(hidden, self.block)

    def rows(self, width):
        return pl.BlockSpec((self.plan.tile, width), lambda t, h, *_: (t, 0))

    def per_row(self):
        return pl.BlockSpec((1, 1, self.plan.tile), lambda t, h, *_: (t, 0, 0))

    def row_values(self, values):
        return values.astype(jnp.float32).reshape(self.tiles, 1, self.plan.tile)

    def hidden(self):
        return pl.BlockSpec((self.plan.tile, self.block), lambda t, h, *_: (t, h))

    def down_bias(self):
        return pl.BlockSpec((1, 1, self.width), lambda t, h, expert, used: (expert[t], 0, 0))

    def weights(self, params, names):
        """Operands and block specs: up, gate, down, then their biases [E, 1, .]."""

        def columns(t, h, expert, used):  # blocks of H in the last axis
            return expert[t], 0, jnp.where(t < used[0], h, self.blocks - 1)

        def lines(t, h, expert, used):  # in the middle axis
            return expert[t], jnp.where(t < used[0], h, self.blocks - 1), 0

        operands = [params[name] for name in (*names, "down")]
        specs = [pl.BlockSpec((1, self.width, self.block), columns) for _ in names]
        specs.append(pl.BlockSpec((1, self.block, self.width), lines))
        if "up_bias" in params:
            operands += [params[name + "_bias"][:, None] for name in (*names, "down")]
            specs += [pl.BlockSpec((1, 1, self.block), columns) for _ in names]
            specs.append(self.down_bias())
        return operands, specs

    def mask(self, values, axis, block):
        """Clears what the last block of H holds beyond the end of H, because it is undefined."""
        if self.size % self.block == 0:
            return values
        column = lax.broadcasted_iota(jnp.int32, values.shape, axis)
        inside = block * self.block + column < self.size
        return jnp.where(inside, values, jnp.zeros_like(values))

    def compiler_params(self):
        return pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        )

    def cost(self, dtype, num_products, num_hidden):
        rows = self.tiles * self.plan.tile
        visits = self.tiles if self.blocks > 1 else self.plan.start.shape[0]
        return pl.CostEstimate(
            flops=2 * rows * self.width * self.size * num_products,
            bytes_accessed=jnp.dtype(dtype).itemsize
            * (
                2 * rows * self.width
                + num_hidden * rows * self.size
                + num_products * visits * self.width * self.size
            ),
            transcendentals=rows * self.size,
        )


def _fetched(x, plan):
    """Operands, their specs, and scratch of a kernel that fetches its own rows of x[T, D].

    Two neighbouring rows of bfloat16 share their 32-bit words. Both are fetched, as one row of
    words, and `odd` says which half of each word is meant.
    """
    tiles, tile = plan.expert.shape[0], plan.tile
    packed = x.dtype == jnp.bfloat16
    if packed and x.shape[0] % 2:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    token = jnp.minimum(plan.rows.token, x.shape[0] - 1).reshape(tiles, 1, tile)
    odd = (token % 2).astype(jnp.float32)

    def tokens(ahead):
        return pl.BlockSpec(
            (1, 1, tile),
            lambda t, h, *_: (jnp.minimum(t + ahead, tiles - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )

    rows = (tile, x.shape[1])
    specs = [
        tokens(0),
        tokens(1),
        pl.BlockSpec((1, 1, tile), lambda t, h, *_: (t, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    scratch = [
        pltpu.VMEM((2, *rows), jnp.uint32 if packed else x.dtype),
        pltpu.VMEM(rows, x.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    return [token, token, odd, x], specs, scratch
