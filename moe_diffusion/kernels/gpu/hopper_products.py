"""The products under hopper.py: a ring of TMA copies, consumed by wgmma.

A block of threads makes a tile of rows and a block of columns. One of its warpgroups does nothing
but start copies of the operands into a ring in shared memory. There is another warpgroup for every
64 rows, which multiplies what has arrived, as in CUTLASS's warp-specialised kernels. TMA reads
zeros beyond the end of an axis and drops what it would write there, so a block of columns need not
divide the width. Mosaic knows no cost estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_diffusion.kernels.tiles import TilePlan, place
from moe_diffusion.kernels.tuning import GPUBlocks

SIDE = 64  # rows that a warpgroup multiplies, and columns of a tile of 128 bytes in shared memory
SHARED_BYTES = 200 << 10  # of 227 KiB; the rest is for barriers and reductions
STAGES = 4  # of the ring, where they fit
MAX_COLUMNS = 256  # of wgmma, and as many totals of 64 rows fill half of the registers

Values = tuple[jax.Array, ...]
# Totals, blocks of the tiles (f32 [64, 64] each) and the rows' weights [64, 64] -> what is stored,
# and what is summed over the columns.
Finish = Callable[[Values, Values, jax.Array | None], tuple[Values, jax.Array | None]]


class _Sizes(NamedTuple):
    """A block of threads: rows, columns, step along the summed axis, and stages of the ring."""

    rows: int
    columns: int
    step: int
    stages: int

    @property
    def warpgroups(self) -> int:
        return self.rows // SIDE

    @classmethod
    def fitting(cls, rows, columns, step, *, lefts, rights, fixed, per_column=0):
        """The most columns that fit into shared memory, and then the most stages.

        lefts, rights: how many operands a stage holds. fixed, per_column: bytes of shared memory
        that are needed besides the stages.
        """

        def stages():
            operands = lefts * rows + rights * columns  # 2 bytes an element
            return (SHARED_BYTES - fixed - per_column * columns) // (2 * step * operands)

        while stages() < 2 and columns > SIDE:
            columns -= SIDE
        return cls(rows, columns, step, max(2, min(STAGES, stages())))


def rows_product(
    name: str,
    blocks: GPUBlocks,
    plan: TilePlan,
    lefts: Sequence[jax.Array],
    rights: Sequence[jax.Array],
    finish: Finish,
    outputs: Sequence[int],
    *,
    transposed: bool = False,
    weights: Sequence[jax.Array] = (),
    tiles: Sequence[jax.Array] = (),
    sums: bool = False,
) -> list[jax.Array]:
    """Multiplies rows by their experts' weights and applies `finish` to the products.

    Args:
      lefts: [R, K] each. One left is multiplied by each of the rights; several give one product,
        the sum of lefts[i] rights[i].
      rights: [E, K, N] each; with `transposed` [E, N, K].
      finish: gets blocks of the products, of `tiles` and of `weights`.
      outputs: the number of columns of each result.
      weights: none or one, f32[R].
      tiles: [R, N] each.
      sums: add a result f32[parts, R]: what `finish` sums, each over a part of the columns.

    Returns:
      [R, columns] for each of the outputs, then the sums.
    """
    rows, summed = lefts[0].shape
    size, tile = rights[0].shape[1 if transposed else 2], plan.tile
    num_totals = len(rights) if len(lefts) == 1 else 1
    sizes = _Sizes.fitting(
        tile, min(blocks.columns, MAX_COLUMNS // num_totals, size), min(blocks.step, summed),
        lefts=len(lefts), rights=len(rights), fixed=2 * tile * 2 * SIDE,
        per_column=2 * tile * len(tiles),
    )  # fmt: skip
    columns, parts = sizes.columns, pl.cdiv(size, sizes.columns)
    results = [jax.ShapeDtypeStruct((rows, n), lefts[0].dtype) for n in outputs]
    results += [jax.ShapeDtypeStruct((parts, rows), jnp.float32)] * sums
    counts = [len(part) for part in (lefts, rights, tiles, weights, outputs)]

    def body(expert, used, *refs, **memory):
        *groups, sum_refs = _split(refs, counts)
        left_refs, right_refs, tile_refs, weight_refs, outs = groups
        number, group = lax.axis_index("block"), lax.axis_index("warpgroup")
        tile_id, part = place(number, parts)
        owner = expert[tile_id]
        ends = _Ends(
            finish, (tile_id, part, group), sizes, memory,
            tile_refs, weight_refs, outs, sum_refs,
        )  # fmt: skip

        def multiply(_, *args):
            *arrived, totals = args
            for i, right in enumerate(arrived[len(lefts) :]):
                left = arrived[min(i, len(lefts) - 1)].at[pl.ds(group * SIDE, SIDE)]
                right = right.transpose((1, 0)) if transposed else right
                plgpu.wgmma(totals[min(i, num_totals - 1)], left, right)
            plgpu.wgmma_wait(len(rights))  # until those of the step before are done
            return totals

        left_spec = _block((tile, sizes.step), lambda k: (tile_id, k))
        if transposed:
            right_spec = _block((columns, sizes.step), lambda k: (part, k))
        else:
            right_spec = _block((sizes.step, columns), lambda k: (k, part))
        # A slack tile has nothing to sum: its totals stay zeros.
        steps = jnp.where(tile_id < used[0], pl.cdiv(summed, sizes.step), 0)
        _pipelined(
            sizes, steps, [left_spec] * len(lefts) + [right_spec] * len(rights),
            [*left_refs, *(ref.at[owner] for ref in right_refs)],
            ends.start, multiply, num_totals, ends.store,
        )  # fmt: skip

    kernel = _kernel(
        name, body, results, plan.expert.shape[0] * parts, sizes,
        _Ends.memory(sizes, lefts[0].dtype, len(tiles), len(weights), sums),
    )  # fmt: skip
    return kernel(plan.expert, plan.used, *lefts, *rights, *tiles, *weights)


class _Ends:
    """The work of a warpgroup with 64 rows before its products (`start`) and after (`store`)."""

    def __init__(self, finish, place, sizes, memory, tiles, weights, outs, sums):
        self.finish, self.memory = finish, memory
        self.tiles, self.weights, self.outs, self.sums = tiles, weights, outs, sums
        tile_id, self.part, self.group = place
        self.rows = pl.ds(tile_id * sizes.rows + self.group * SIDE, SIDE)
        self.columns = sizes.columns

    @staticmethod
    def memory(sizes: _Sizes, dtype, num_tiles: int, num_weights: int, sums: bool):
        groups, chunks = sizes.warpgroups, sizes.columns // SIDE
        memory: dict[str, Any] = {"buffer": plgpu.SMEM((groups, 2, SIDE, SIDE), dtype)}
        if num_tiles:
            memory["tiles"] = plgpu.SMEM((groups, num_tiles, chunks, SIDE, SIDE), dtype)
        if num_weights:
            memory["weight"] = plgpu.SMEM((groups, SIDE), jnp.float32)
        if sums:
            memory["sums"] = plgpu.SMEM((groups, SIDE), jnp.float32)
        if arrivals := num_tiles * chunks + num_weights:
            memory["arrived"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=groups)
        return memory

    def at(self, chunk):
        return self.rows, pl.ds(self.part * self.columns + chunk * SIDE, SIDE)

    def mine(self, name):
        return self.memory[name].at[self.group]

    def start(self):
        """Starts to fetch tiles and weights, so that they arrive while the products are made."""
        for ref in self.weights:
            plgpu.copy_gmem_to_smem(ref.at[self.rows], self.mine("weight"), self.mine("arrived"))
        for i, ref in enumerate(self.tiles):
            for chunk in range(self.columns // SIDE):
                to = self.mine("tiles").at[i, chunk]
                plgpu.copy_gmem_to_smem(ref.at[self.at(chunk)], to, self.mine("arrived"))

    def store(self, totals):
        gate, partial_sums, write = None, None, _writer(self.mine("buffer"))
        if self.tiles or self.weights:
            plgpu.barrier_wait(self.mine("arrived"))
        if self.weights:
            gate = lax.broadcast_in_dim(self.mine("weight")[...], (SIDE, SIDE), (0,))
        for chunk in range(self.columns // SIDE):
            tiles = tuple(
                self.mine("tiles")[i, chunk].astype(jnp.float32) for i in range(len(self.tiles))
            )
            some = slice(chunk * SIDE, (chunk + 1) * SIDE)
            values, to_sum = self.finish(tuple(total[:, some] for total in totals), tiles, gate)
            for out, value in zip(self.outs, values, strict=True):
                write(value, out.at[self.at(chunk)])
            if self.sums:
                partial_sums = to_sum if chunk == 0 else partial_sums + to_sum
        for out in self.sums:
            self.mine("sums")[...] = partial_sums.sum(1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.mine("sums"), out.at[self.part, self.rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def outer_product(
    blocks: GPUBlocks, plan: TilePlan, left: jax.Array, right: jax.Array
) -> jax.Array:
    """Per expert the sum over its rows of left[r]^T right[r]: [R, I], [R, O] -> f32[E, I, O]."""
    shape = (plan.start.shape[0], left.shape[1], right.shape[1])
    rows = min(2 * SIDE, shape[1])
    sizes = _Sizes.fitting(
        rows, min(blocks.columns, MAX_COLUMNS, shape[2]), SIDE,
        lefts=1, rights=1, fixed=4 * rows * 2 * SIDE,
    )  # fmt: skip
    columns = sizes.columns
    per_tile, down, across = plan.tile // SIDE, pl.cdiv(shape[1], rows), pl.cdiv(shape[2], columns)

    def body(start, end, left, right, out, *, buffer):
        number, group = lax.axis_index("block"), lax.axis_index("warpgroup")
        owner, i, j = place(number, down, across)
        first, last = start[owner] * per_tile, end[owner] * per_tile

        def multiply(_, left, right, totals):
            left = left.at[:, pl.ds(group * SIDE, SIDE)]
            plgpu.wgmma(totals[0], left.transpose((1, 0)), right)
            plgpu.wgmma_wait(1)
            return totals

        def store(totals):
            write, mine = _writer(buffer.at[group]), pl.ds(i * rows + group * SIDE, SIDE)
            for chunk in range(columns // SIDE):
                value = totals[0][:, chunk * SIDE : (chunk + 1) * SIDE]
                write(value, out.at[owner, mine, pl.ds(j * columns + chunk * SIDE, SIDE)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        specs = [
            _block((SIDE, rows), lambda k: (first + k, i)),
            _block((SIDE, columns), lambda k: (first + k, j)),
        ]
        steps, nothing = last - first, lambda: None
        _pipelined(sizes, steps, specs, [left, right], nothing, multiply, 1, store)

    scratch = {"buffer": plgpu.SMEM((sizes.warpgroups, 2, SIDE, SIDE), jnp.float32)}
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = _kernel("moe_outer", body, [result], shape[0] * down * across, sizes, scratch)
    return kernel(plan.start, plan.end, left, right)[0]


def _split(refs, counts):
    """Cuts refs into groups of the given sizes; the last group is what is left."""
    groups = []
    for count in counts:
        groups.append(refs[:count])
        refs = refs[count:]
    return [*groups, refs]


def _block(shape, index_map):
    """A block of an operand. It is still read while the next one is multiplied (delay_release)."""
    return plgpu.BlockSpec(shape, index_map, delay_release=1)


def _kernel(name, body, results, grid, sizes, scratch):
    """A kernel of `grid` blocks, each with one warpgroup for every 64 rows and one that copies."""
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _pipelined(sizes, steps, specs, operands, start, multiply, num_totals, store):
    """Runs start(), then multiply(step, *blocks, totals) for each step, then store(totals)."""

    def compute(pipeline):
        def scope(*totals):
            start()
            pipeline(totals)
            store([total[...] for total in totals])

        pl.run_scoped(scope, *[plgpu.ACC((SIDE, sizes.columns), jnp.float32)] * num_totals)

    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        in_specs=specs,
        max_concurrent_steps=sizes.stages,
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=sizes.warpgroups,
        compute_context=compute,
    )(*operands)


def _writer(buffer):
    """Returns write(value[64, 64], ref), which uses the two halves of a buffer in turn."""
    writes = 0

    def write(value, ref):
        nonlocal writes
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # this half's last value is out
        half = buffer.at[writes % 2]
        half[...] = value.astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(half, ref)
        writes += 1

    return write
