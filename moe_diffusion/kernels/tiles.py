"""Rows for grouped kernels: sorted by expert, every expert's rows padded to whole tiles.

All rows of a tile have one expert, so a kernel needs one number per tile to find its weights. Every
expert has at least one tile, even without rows, so a kernel that walks over the tiles writes the
gradient of every expert. A padding row holds no token: it is read as zeros and weighs nothing.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from moe_diffusion.kernels.rows import RowPlan, plan_rows, stable_order, token_major


@flax.struct.dataclass
class TilePlan:
    """Assignments in the experts' order, R = num_tiles * tile rows.

    rows:       the RowPlan of the R rows
    assignment: i32[R]  the assignment in each row; N marks padding
    row:        i32[N]  the row of each assignment; R for an unused one
    expert:     i32[num_tiles]  the expert of each tile; never decreases
    used:       i32[1]  how many tiles belong to an expert; the tiles after them are slack
    start, end: i32[E]  expert e has the tiles start[e]:end[e]
    tile:       the number of rows of a tile
    """

    rows: RowPlan
    assignment: jax.Array
    row: jax.Array
    expert: jax.Array
    used: jax.Array
    start: jax.Array
    end: jax.Array
    tile: int = flax.struct.field(pytree_node=False)


def place(number: jax.Array, *sizes: int) -> tuple[jax.Array, ...]:
    """The indices of program `number` in a grid [.., *sizes] whose last axis is the fastest.

    Programs that run side by side on a GPU then have the same tile and expert, and share rows and
    weights in the L2 cache.
    """
    found = []
    for size in reversed(sizes):
        found.append(lax.rem(number, size))
        number = lax.div(number, size)
    return number, *reversed(found)


def num_tiles(num_assignments: int, num_experts: int, tile: int) -> int:
    """The number of tiles that suffices however the assignments fall on the experts."""
    return -(-num_assignments // tile) + num_experts


def plan_tiles(
    token: jax.Array,
    expert: jax.Array,
    *,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    tile: int,
) -> TilePlan:
    """Sorts assignments into tiles, without a scatter.

    token, expert i32[N]: expert == num_experts marks an unused assignment. slots_per_token: K if
    the list has K used assignments of token 0, then K of token 1, and so on; else None.
    """
    num = expert.shape[0]
    total = num_tiles(num, num_experts, tile)
    order = stable_order(expert, num_experts + 1)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    bounds = jnp.searchsorted(expert[order], jnp.append(ids, num_experts)).astype(jnp.int32)
    first, count = bounds[:-1], jnp.diff(bounds)
    end = jnp.cumsum(jnp.maximum(1, -(-count // tile)), dtype=jnp.int32)
    start = jnp.append(0, end[:-1]).astype(jnp.int32)
    tile_ids = jnp.arange(total, dtype=jnp.int32)
    owner = jnp.searchsorted(end, tile_ids, side="right").astype(jnp.int32)
    owner = jnp.minimum(owner, num_experts - 1)

    row_expert = jnp.broadcast_to(owner[:, None], (total, tile)).reshape(-1)
    offset = jnp.arange(total * tile, dtype=jnp.int32) - start[row_expert] * tile
    place = jnp.minimum(first[row_expert] + offset, num - 1)
    filled = offset < count[row_expert]
    assignment = jnp.where(filled, order[place], num)
    row_token = jnp.where(filled, token[order[place]], num_tokens).astype(jnp.int32)

    rank = stable_order(order, num)  # of each assignment in the sorted list
    owner_of = jnp.minimum(expert, num_experts - 1)
    row = start[owner_of] * tile + rank - first[owner_of]
    row = jnp.where(expert < num_experts, row, total * tile).astype(jnp.int32)
    if slots_per_token:
        rows = token_major(row_token, row, num_tokens, slots_per_token)
    else:
        rows = plan_rows(row_token, num_tokens)
    return TilePlan(rows, assignment, row, owner, end[-1:], start, end, tile)


def fixed_tiles(token: jax.Array, *, num_tokens: int, tile: int) -> TilePlan:
    """The plan of experts with C slots each: token i32[E, C], num_tokens or more in empty slots.

    C is rounded up to whole tiles. Assignment n is slot n of all slots, read expert by expert.
    """
    num_experts, slots = token.shape
    padded = -(-slots // tile) * tile
    widen = ((0, 0), (0, padded - slots))
    row_token = jnp.pad(token, widen, constant_values=num_tokens).reshape(-1).astype(jnp.int32)
    ids = jnp.arange(num_experts * slots, dtype=jnp.int32).reshape(num_experts, slots)
    each = padded // tile
    owner = jnp.arange(num_experts, dtype=jnp.int32)
    ends = (owner + 1) * each
    return TilePlan(
        rows=plan_rows(row_token, num_tokens),
        assignment=jnp.pad(ids, widen, constant_values=num_experts * slots).reshape(-1),
        row=(ids + owner[:, None] * (padded - slots)).reshape(-1),
        expert=jnp.repeat(owner, each),
        used=ends[-1:],
        start=ends - each,
        end=ends,
        tile=tile,
    )
