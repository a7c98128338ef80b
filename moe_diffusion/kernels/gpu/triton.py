"""Pallas-Triton kernels of the experts, for every NVIDIA GPU from A100 on.

Rows are sorted by expert into tiles, and all rows of a tile have one expert (`TilePlan`). A program
looks up its expert and its tokens in the plan. It gathers the tokens while it loads them, so no
sorted copy of them exists. There are five kernels, named after what they compute:

    up        hidden = x[token] W_up, W_gate (+ bias), and the activation if nothing is saved
    down      out = weight * (act(hidden) W_down + bias)
    d_hidden  from d_y[token] W_down^T: gradients of hidden and of weight, and weight * act(hidden)
    d_rows    sum over the projections of d_hidden W^T
    outer     per expert, sum over its rows of left^T right: the gradients of the weights

A program makes b columns of one tile. So a kernel reads its left operand once for every b columns
and an expert's weights once for every tile of its rows. Programs are numbered with the columns
fastest and the experts slowest, so that those which run together share both operands in the L2
cache. Traffic in elements for R rows, n = 2 projections in (SwiGLU) or 1, at least:

    forward   R D + n R H (written, read) + R D + (n + 1) E D H
    backward  4 R D + (3 n + 2) R H + 2 (n + 1) E D H
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.grouped import Kernels
from moe_diffusion.kernels.tiles import place
from moe_diffusion.kernels.tuning import GPUBlocks


class GPUKernels(Kernels):
    """The three kernels of `grouped.Kernels`.

    blocks: sizes of the columns and of the summed axis; interpret: run on a CPU, for tests.
    """

    def __init__(self, blocks: GPUBlocks, interpret: bool = False):
        self.blocks, self.interpret = blocks, interpret

    def forward(self, kind, x, weight, params, plan, save):
        names = mlp.inputs(kind)
        hidden_size = params["up"].shape[-1]
        saved = names if save else ("inner",)
        weights = [params[name] for name in names]
        biases = [params[name + "_bias"] for name in names if name + "_bias" in params]
        hidden = self._call(
            partial(_up_kernel, kind=kind, save=save, n=len(names)),
            plan,
            (plan.rows.token, x, *weights, *biases),
            [(hidden_size, x.dtype)] * len(saved),
            hidden_size,
            products=len(names) * x.shape[1],
        )
        bias = [params["down_bias"]] if "down_bias" in params else []
        (out,) = self._call(
            partial(_down_kernel, kind=kind if save else None, n=len(saved)),
            plan,
            (weight, *hidden, params["down"], *bias),
            [(x.shape[1], x.dtype)],
            x.shape[1],
            products=hidden_size,
        )
        return out, tuple(hidden) if save else ()

    def backward(self, kind, d_y, weight, hidden, params, plan):
        names = mlp.inputs(kind)
        width, hidden_size = params["up"].shape[1:]
        bias = [params["down_bias"]] if "down_bias" in params else []
        parts = pl.cdiv(hidden_size, self.blocks.columns)
        inner, *d_hidden, d_weight = self._call(
            partial(_d_hidden_kernel, kind=kind, n=len(names)),
            plan,
            (plan.rows.token, weight, d_y, *hidden, params["down"], *bias),
            [(hidden_size, hidden[0].dtype)] * (len(names) + 1) + [(parts, jnp.float32)],
            hidden_size,
            products=width,
        )
        (d_rows,) = self._call(
            partial(_d_rows_kernel, n=len(names)),
            plan,
            (*d_hidden, *(params[name] for name in names)),
            [(width, d_y.dtype)],
            width,
            products=len(names) * hidden_size,
        )
        return d_rows, d_weight.sum(1), inner, tuple(d_hidden)

    def outer(self, left, right, plan, *, gather):
        num_experts = plan.start.shape[0]
        shape = (num_experts, left.shape[1], right.shape[1])
        block = self.blocks.columns
        rows = plan.assignment.shape[0]
        return pl.pallas_call(
            partial(_outer_kernel, tile=plan.tile, gather=gather, blocks=self.blocks),
            grid=(num_experts * pl.cdiv(shape[1], block) * pl.cdiv(shape[2], block),),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=self.blocks.warps, num_stages=3),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * shape[1] * shape[2],
                bytes_accessed=left.dtype.itemsize * rows * (shape[1] + shape[2])
                + 4 * num_experts * shape[1] * shape[2],
                transcendentals=0,
            ),
            interpret=self.interpret,
            name="moe_outer",
        )(plan.start, plan.end, plan.rows.token, left, right)

    def _call(self, kernel, plan, operands, outputs, columns, *, products):
        """Runs a program per tile and block of columns; outputs: (columns, dtype) of each."""
        rows = plan.assignment.shape[0]
        arrays = [operand for operand in operands if operand.ndim > 1]
        results = [jax.ShapeDtypeStruct((rows, size), dtype) for size, dtype in outputs]
        return pl.pallas_call(
            partial(kernel, tile=plan.tile, columns=columns, blocks=self.blocks),
            grid=(plan.expert.shape[0] * pl.cdiv(columns, self.blocks.columns),),
            out_shape=results,
            compiler_params=plgpu.CompilerParams(num_warps=self.blocks.warps, num_stages=3),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * columns * products,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *results)),
                transcendentals=rows * columns,
            ),
            interpret=self.interpret,
            name="moe" + kernel.func.__name__.removesuffix("_kernel"),
        )(plan.expert, plan.used, *operands)


# --- inside the kernels --------------------------------------------------------------------------


def _load(ref, *index, masks):
    """Loads a block of `ref`. Each mask belongs to one axis; where it is false, zeros are read.

    Where the first index is a vector of row numbers (of a ref [T, D]), these rows are gathered.
    """
    if isinstance(index[0], jax.Array) and index[0].ndim:
        rows, columns = index
        shape = (rows.shape[0], columns.size)
        ids = columns.start + jnp.arange(columns.size)
        index = (jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(ids[None], shape))
    mask = None
    for axis, inside in enumerate(masks):
        if inside is not None:
            wide = inside.reshape([-1 if i == axis else 1 for i in range(len(masks))])
            mask = wide if mask is None else mask & wide
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _dot(a, b):
    """a[M, K] b[K, N] with f32 accumulation. f32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


class _Program:
    """The place of one program in the grid of tiles and blocks of columns."""

    def __init__(self, expert, used, tile, columns, blocks):
        self.tile, self.step, self.block = tile, blocks.step, blocks.columns
        number, self.column_block = place(pl.program_id(0), pl.cdiv(columns, self.block))
        self.expert = expert[number]
        self.is_used = number < used[0]
        self.rows = pl.ds(number * tile, tile)
        self.columns = pl.ds(self.column_block * self.block, self.block)
        ids = self.column_block * self.block + jnp.arange(self.block)
        self.inside = ids < columns if columns % self.block else None

    def steps(self, size, body, *totals):
        """Runs body(slice, mask, *totals) along the summed axis; not at all in a slack tile."""

        def step(k, totals):
            ids = k * self.step + jnp.arange(self.step)
            mask = ids < size if size % self.step else None
            return body(pl.ds(k * self.step, self.step), mask, *totals)

        count = jnp.int32(pl.cdiv(size, self.step)) * self.is_used.astype(jnp.int32)
        return lax.fori_loop(0, count, step, totals)

    def zeros(self):
        return jnp.zeros((self.tile, self.block), jnp.float32)

    def store(self, ref, values):
        mask = None if self.inside is None else self.inside[None, :]
        plgpu.store(ref.at[self.rows, self.columns], values.astype(ref.dtype), mask=mask)


def _up_kernel(expert, used, token, x, *refs, kind, save, n, tile, columns, blocks):
    at = _Program(expert, used, tile, columns, blocks)
    weights, biases, outs = refs[:n], refs[n : -(n if save else 1)], refs[-(n if save else 1) :]
    tokens = plgpu.load(token.at[at.rows])
    known = tokens < x.shape[0]

    def step(k, inside, *totals):
        rows = _load(x, tokens, k, masks=(known, inside))
        blocks_of_weights = (
            _load(w, at.expert, k, at.columns, masks=(inside, at.inside)) for w in weights
        )
        return tuple(t + _dot(rows, w) for t, w in zip(totals, blocks_of_weights, strict=True))

    hidden = at.steps(x.shape[1], step, *(at.zeros() for _ in weights))
    if biases:
        added = (_load(b, at.expert, at.columns, masks=(at.inside,)) for b in biases)
        hidden = [h + b[None, :] for h, b in zip(hidden, added, strict=True)]
    results = hidden if save else [mlp.activation(kind)(*hidden)]
    for out, values in zip(outs, results, strict=True):
        at.store(out, values)


def _down_kernel(expert, used, weight, *refs, kind, n, tile, columns, blocks):
    at = _Program(expert, used, tile, columns, blocks)
    hidden, down, bias, out = refs[:n], refs[n], refs[n + 1 : -1], refs[-1]

    def step(k, inside, total):
        values = [_load(h, at.rows, k, masks=(None, inside)) for h in hidden]
        if kind is None:
            (inner,) = values
        else:
            inner = mlp.activation(kind)(*(v.astype(jnp.float32) for v in values))
        block = _load(down, at.expert, k, at.columns, masks=(inside, at.inside))
        return (total + _dot(inner.astype(block.dtype), block),)

    (total,) = at.steps(hidden[0].shape[1], step, at.zeros())
    if bias:
        total += _load(bias[0], at.expert, at.columns, masks=(at.inside,))[None, :]
    at.store(out, plgpu.load(weight.at[at.rows])[:, None] * total)


def _d_hidden_kernel(expert, used, token, weight, d_y, *refs, kind, n, tile, columns, blocks):
    at = _Program(expert, used, tile, columns, blocks)
    hidden, down, refs = refs[:n], refs[n], refs[n + 1 :]
    bias, (inner_out, *d_hidden, d_weight) = refs[: -(n + 2)], refs[-(n + 2) :]
    tokens = plgpu.load(token.at[at.rows])
    known = tokens < d_y.shape[0]

    def step(k, inside, total, from_bias):
        d_out = _load(d_y, tokens, k, masks=(known, inside))
        block = _load(down, at.expert, at.columns, k, masks=(at.inside, inside))
        if bias:
            pulled = d_out * _load(bias[0], at.expert, k, masks=(inside,))[None, :]
            from_bias += jnp.sum(pulled.astype(jnp.float32), axis=1)
        return total + _dot(d_out, block.T), from_bias

    zeros = jnp.zeros(tile, jnp.float32)
    d_inner, from_bias = at.steps(d_y.shape[1], step, at.zeros(), zeros)
    values = [_load(h, at.rows, at.columns, masks=(None, at.inside)) for h in hidden]
    inner, pull = jax.vjp(mlp.activation(kind), *(v.astype(jnp.float32) for v in values))
    gate = plgpu.load(weight.at[at.rows])[:, None]
    at.store(inner_out, gate * inner)
    for ref, values in zip(d_hidden, pull(gate * d_inner), strict=True):
        at.store(ref, values)
    # Every block of columns holds a part of the sum. The bias must count in one of them only.
    dots = jnp.sum(d_inner * inner, axis=1) + jnp.where(at.column_block == 0, from_bias, 0.0)
    plgpu.store(d_weight.at[at.rows, at.column_block], dots)


def _d_rows_kernel(expert, used, *refs, n, tile, columns, blocks):
    at = _Program(expert, used, tile, columns, blocks)
    d_hidden, weights, out = refs[:n], refs[n:-1], refs[-1]

    def step(k, inside, total):
        for gradient, weight in zip(d_hidden, weights, strict=True):
            left = _load(gradient, at.rows, k, masks=(None, inside))
            right = _load(weight, at.expert, at.columns, k, masks=(at.inside, inside))
            total += _dot(left, right.T)
        return (total,)

    (total,) = at.steps(d_hidden[0].shape[1], step, at.zeros())
    at.store(out, total)


def _outer_kernel(start, end, token, left, right, out, *, tile, gather, blocks):
    size = blocks.columns
    parts = (pl.cdiv(ref.shape[1], size) for ref in (left, right))
    expert, *numbers = place(pl.program_id(0), *parts)
    slices, insides = [], []
    for number, ref in zip(numbers, (left, right), strict=True):
        first = number * size
        slices.append(pl.ds(first, size))
        ids = first + jnp.arange(size)
        insides.append(ids < ref.shape[1] if ref.shape[1] % size else None)

    def read(ref, rows, columns, inside, gathered):
        if not gathered:
            return _load(ref, rows, columns, masks=(None, inside))
        tokens = plgpu.load(token.at[rows])
        return _load(ref, tokens, columns, masks=(tokens < ref.shape[0], inside))

    def step(k, total):
        rows = pl.ds(k * blocks.step, blocks.step)
        a = read(left, rows, slices[0], insides[0], gather == "left")
        b = read(right, rows, slices[1], insides[1], gather == "right")
        return total + _dot(a.T, b)

    per_tile = tile // blocks.step
    total = lax.fori_loop(
        start[expert] * per_tile,
        end[expert] * per_tile,
        step,
        jnp.zeros((size, size), jnp.float32),
    )
    mask = None
    if insides[0] is not None or insides[1] is not None:
        everywhere = jnp.ones(size, bool)
        rows, columns = (everywhere if m is None else m for m in insides)
        mask = rows[:, None] & columns[None, :]
    plgpu.store(out.at[expert, slices[0], slices[1]], total, mask=mask)
