"""Mosaic GPU kernels of the experts for Hopper: TMA copies feed wgmma in specialised warpgroups.

STATUS: never timed and never run on a GPU. They compile for an H100 and give the right numbers
when interpreted. Nothing chooses them by itself: a table of tile sizes has to name them
(`tuning.GPUBlocks.kernels`), and only `python -m moe_diffusion.tune` on a GPU of compute capability
9 writes such a table. This is the one place that says so; hopper_products.py belongs to it.

They compute the products of triton.py on the same rows (`TilePlan`), in bf16 and f16. Compared with
Triton's kernels, traffic in elements:

- XLA gathers the rows beforehand, because TMA copies no scattered rows on Hopper: 2 R D more in
  each direction;
- `up` writes the activation beside what the backward pass needs, and `down` reads only the
  activation, because wgmma takes its operands from shared memory: R H more with one projection in,
  the same with two;
- everything else is fused as in triton.py.

Triton's kernels take over what these cannot do (`can_run`): experts with biases, f32, widths that
64 does not divide, and tiles of other sizes.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.gpu.hopper_products import SIDE, outer_product, rows_product
from moe_diffusion.kernels.gpu.triton import GPUKernels
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.tiles import TilePlan
from moe_diffusion.kernels.tuning import GPUBlocks

HALF = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


def can_run(params: Params, blocks: GPUBlocks, tile: int) -> bool:
    """Whether the kernels can compute these experts in tiles of `tile` rows."""
    _, width, hidden = params["up"].shape
    return (
        params["up"].dtype in HALF
        and not any(name.endswith("_bias") for name in params)
        and tile in (SIDE, 2 * SIDE)
        and not any(size % SIDE for size in (width, hidden, blocks.columns, blocks.step))
    )


class HopperKernels(GPUKernels):
    """The three kernels of `grouped.Kernels`.

    blocks: rows are 64 or 128; columns and step are multiples of 64.
    """

    def forward(self, kind, x, weight, params, plan, save):
        if not can_run(params, self.blocks, plan.tile):
            return super().forward(kind, x, weight, params, plan, save)
        names, hidden_size = mlp.inputs(kind), params["up"].shape[-1]
        inner, *hidden = rows_product(
            "moe_up", self.blocks, plan, [_gathered(x, plan)], [params[name] for name in names],
            partial(_up, kind=kind, save=save), [hidden_size] * (1 + save * len(names)),
        )  # fmt: skip
        (out,) = rows_product(
            "moe_down", self.blocks, plan, [inner], [params["down"]], _down, [x.shape[1]],
            weights=[weight],
        )  # fmt: skip
        return out, tuple(hidden)

    def backward(self, kind, d_y, weight, hidden, params, plan):
        if not can_run(params, self.blocks, plan.tile):
            return super().backward(kind, d_y, weight, hidden, params, plan)
        names = mlp.inputs(kind)
        _, width, hidden_size = params["up"].shape
        inner, *d_hidden, d_weight = rows_product(
            "moe_d_hidden", self.blocks, plan, [_gathered(d_y, plan)], [params["down"]],
            partial(_d_hidden, kind=kind), [hidden_size] * (1 + len(names)),
            transposed=True, weights=[weight], tiles=hidden, sums=True,
        )  # fmt: skip
        (d_rows,) = rows_product(
            "moe_d_rows", self.blocks, plan, d_hidden, [params[name] for name in names],
            _as_it_is, [width], transposed=True,
        )  # fmt: skip
        return d_rows, d_weight.sum(0), inner, tuple(d_hidden)

    def outer(self, left, right, plan, *, gather):
        widths = (left.shape[1], right.shape[1])
        half = left.dtype == right.dtype and left.dtype in HALF
        if not half or plan.tile % SIDE or any(width % SIDE for width in widths):
            return super().outer(left, right, plan, gather=gather)
        left = _gathered(left, plan) if gather == "left" else left
        right = _gathered(right, plan) if gather == "right" else right
        return outer_product(self.blocks, plan, left, right)


def _gathered(x: jax.Array, plan: TilePlan) -> jax.Array:
    """The rows [R, D] of a plan, taken from x[T, D]; zeros in rows that hold no token."""
    return jnp.take(x, plan.rows.token, axis=0, mode="fill", fill_value=0)


# --- what is done with the totals, 64 x 64 of them at a time --------------------------------------


def _up(totals, tiles, gate, *, kind, save):
    inner = mlp.activation(kind)(*totals)
    return (inner, *totals) if save else (inner,), None


def _down(totals, tiles, gate):
    return (gate * totals[0],), None


def _d_hidden(totals, tiles, gate, *, kind):
    (d_inner,) = totals
    inner, slopes = _slopes(kind, *tiles)
    pulled = gate * d_inner
    return (gate * inner, *(pulled * slope for slope in slopes)), d_inner * inner


def _slopes(kind, up, gate=None):
    """The activation and its derivatives by each argument; Mosaic cannot lower `jax.vjp`'s."""
    if kind == "gelu":
        scale, cubic = (2 / math.pi) ** 0.5, 0.044715
        tanh = jnp.tanh(scale * (up + cubic * up * up * up))
        rise = scale * (1 + 3 * cubic * up * up)
        return 0.5 * up * (1 + tanh), (0.5 * (1 + tanh + up * (1 - tanh * tanh) * rise),)
    bent = up if kind == "silu" else gate
    share = jax.nn.sigmoid(bent)
    silu, slope = bent * share, share * (1 + bent * (1 - share))
    return (silu, (slope,)) if kind == "silu" else (silu * up, (silu, up * slope))


def _as_it_is(totals, tiles, gate):
    return totals, None
