"""What a TPU kernel of the experts does with one tile; tpu.py hands it the tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_diffusion.kernels import mlp

LANES = 128


def _dot(a, b, contract):
    """a . b over one axis of each, with f32 accumulation. f32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(line):
    """[1, M] -> [M, 1], by way of a whole tile: only a transpose moves lanes to sublanes."""
    return jnp.broadcast_to(line, (LANES, line.shape[1])).T[:, :1]


def fetching_kernel(expert, used, here, ahead, odd, x, weight, *refs, kernel):
    """Starts to fetch the next tile's rows, waits for this tile's, and hands these to `kernel`."""
    *refs, buffers, rows, arrived = refs
    tile, block = pl.program_id(0), pl.program_id(1)
    packed = x.dtype == jnp.bfloat16
    source = x.bitcast(jnp.uint32) if packed else x
    size = rows.shape[0]

    def copy(tokens, row, slot):
        line = tokens[0, 0, row] >> 1 if packed else tokens[0, 0, row]
        target = buffers.at[slot, pl.ds(row, 1)]
        return pltpu.make_async_copy(source.at[pl.ds(line, 1)], target, arrived.at[slot])

    def fetch(tokens, slot):
        @pl.loop(0, size)
        def _(row):
            copy(tokens, row, slot).start()

    slot = lax.rem(tile, 2)

    @pl.when(jnp.logical_and(tile == 0, block == 0))
    def _():
        fetch(here, 0)

    @pl.when(jnp.logical_and(tile + 1 < used[0], block == 0))
    def _():
        fetch(ahead, 1 - slot)

    @pl.when(jnp.logical_and(tile < used[0], block == 0))
    def _():
        @pl.loop(0, size)
        def _(row):
            copy(here, row, slot).wait()

        words = buffers[slot]
        if packed:
            high = lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
            low = lax.bitcast_convert_type(words << 16, jnp.float32)
            words = jnp.where(_column(odd[0]) > 0.5, high, low)
        rows[...] = words.astype(rows.dtype)

    kernel(expert, used, rows, weight, *refs)


def forward_kernel(expert, used, x, weight, *refs, kind, grid, biased):
    names = mlp.inputs(kind)
    n = len(names)
    (*inputs, down), refs = refs[: n + 1], refs[n + 1 :]
    biases, refs = (refs[: n + 1], refs[n + 1 :]) if biased else ((), refs)
    out, *hidden, total = refs
    tile, block = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < used[0])
    def _():
        values = [_dot(x[...], w[0], ((1,), (0,))) for w in inputs]
        if biased:
            values = [v + b[0] for v, b in zip(values, biases[:n], strict=True)]
        for ref, value in zip(hidden, values, strict=False):  # none if nothing is saved
            ref[...] = value.astype(ref.dtype)
        inner = mlp.activation(kind)(*(grid.mask(v, 1, block) for v in values)).astype(x.dtype)
        product = _dot(inner, grid.mask(down[0], 0, block), ((1,), (0,)))
        total[...] = jnp.where(block == 0, product, total[...] + product)

        @pl.when(block == grid.blocks - 1)
        def _():
            result = total[...] + biases[n][0] if biased else total[...]
            out[...] = (_column(weight[0]) * result).astype(out.dtype)

    @pl.when(tile >= used[0])
    def _():
        for ref in (out, *hidden):
            ref[...] = jnp.zeros_like(ref)


def backward_kernel(expert, used, d_out, weight, *refs, kind, grid, biased):
    names = mlp.inputs(kind)
    n = len(names)
    hidden, refs = refs[:n], refs[n:]
    (*inputs, down), refs = refs[: n + 1], refs[n + 1 :]
    bias, refs = (refs[0], refs[1:]) if biased else (None, refs)
    d_rows, d_weight, inner_out, *d_hidden, total, dots = refs
    tile, block = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < used[0])
    def _():
        gate = _column(weight[0])
        d_inner = _dot(d_out[...], down[0], ((1,), (1,)))
        values = [grid.mask(ref[...].astype(jnp.float32), 1, block) for ref in hidden]
        d_inner = grid.mask(d_inner, 1, block)
        inner, pull = jax.vjp(mlp.activation(kind), *values)
        dot = jnp.sum(d_inner * inner, axis=1, keepdims=True)
        inner_out[...] = (gate * inner).astype(inner_out.dtype)
        product = 0.0
        gradients = pull(gate * d_inner)
        for ref, w, gradient in zip(d_hidden, inputs, gradients, strict=True):
            gradient = gradient.astype(ref.dtype)
            ref[...] = gradient
            product += _dot(gradient, grid.mask(w[0], 1, block), ((1,), (1,)))
        total[...] = jnp.where(block == 0, product, total[...] + product)
        dots[...] = jnp.where(block == 0, dot, dots[...] + dot)

        @pl.when(block == grid.blocks - 1)
        def _():
            d_rows[...] = total[...].astype(d_rows.dtype)
            sums = dots[...]
            if biased:
                pulled = d_out[...].astype(jnp.float32) * bias[0].astype(jnp.float32)
                sums += jnp.sum(pulled, axis=1, keepdims=True)
            d_weight[0] = sums.T[:1]

    @pl.when(tile >= used[0])
    def _():
        for ref in (d_rows, d_weight, inner_out, *d_hidden):
            ref[...] = jnp.zeros_like(ref)


def outer_kernel(expert, used, left, right, out):
    tile = pl.program_id(2)
    first = jnp.logical_or(tile == 0, expert[tile] != expert[jnp.maximum(tile - 1, 0)])
    product = _dot(left[...], right[...], ((0,), (0,)))

    @pl.when(first)
    def _():
        out[0] = product

    @pl.when(jnp.logical_and(jnp.logical_not(first), tile < used[0]))
    def _():
        out[0] += product
