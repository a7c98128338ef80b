"""Experts on NVIDIA GPUs: the entry, and which of two sets of kernels computes them.

Triton's kernels (triton.py) run on every GPU from A100 on and are what a GPU gets. Those for Hopper
(hopper.py) run only where a table of tile sizes names them, see `tuning.gpu_blocks`.
"""

from __future__ import annotations

import jax

from moe_diffusion.kernels.gpu.triton import GPUKernels
from moe_diffusion.kernels.grouped import sorted_by_expert
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.tuning import GPUBlocks, gpu_blocks


def gpu(
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
    blocks = gpu_blocks(params, token.shape[0])
    kernels, arrays = choose(blocks, interpret), (x, token, expert, weight)
    return sorted_by_expert(kernels, blocks.rows, *arrays, params, kind, slots_per_token)


def choose(blocks: GPUBlocks, interpret: bool = False) -> GPUKernels:
    """The kernels that `blocks.kernels` names. Hopper's are never interpreted here."""
    if blocks.kernels == "mosaic" and not interpret:
        # Imported here alone, because Pallas calls the API that they use unstable.
        from moe_diffusion.kernels.gpu.hopper import HopperKernels

        return HopperKernels(blocks)
    return GPUKernels(blocks, interpret)
