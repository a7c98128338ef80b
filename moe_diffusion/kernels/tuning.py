"""Tile sizes of the grouped kernels, by kind of device and shape.

`python -m moe_diffusion.tune` measures the candidates on the device at hand and writes the best
of each shape into tiles.json beside this file (or where MOE_DIFFUSION_TILES says); a shape
that is not there follows the rules below.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_diffusion.kernels.mlp import Params


class TPUTiles(NamedTuple):
    """rows of a tile, and columns of the experts' hidden width taken at a time."""

    rows: int
    hidden: int


class GPUBlocks(NamedTuple):
    """rows of a tile, columns that a program makes, step along the summed axis, warps.

    kernels: "triton" (gpu.py) or "mosaic" (hopper.py, whose warps follow from the rows). No rule
    chooses the latter, which was never timed; a table that `tune` wrote on a Hopper GPU may.
    """

    rows: int
    columns: int
    step: int
    warps: int
    kernels: str = "triton"


def table_path() -> Path:
    return Path(os.environ.get("MOE_DIFFUSION_TILES") or Path(__file__).with_name("tiles.json"))


def tpu_tiles(params: Params, num_assignments: int, slots: int | None = None) -> TPUTiles:
    """For N assignments; with `slots` per expert, tiles that leave little of the last one empty."""
    tuned = _tuned(params, num_assignments)
    if tuned is not None:
        return TPUTiles(*tuned)
    num_experts, width, hidden = params["up"].shape
    if slots is not None:
        rows = min((512, 256, 128), key=lambda tile: -(-slots // tile) * tile)
    else:
        rows = _fitting(num_assignments // num_experts)
    # All of a small expert's weights stay in VMEM; of a large one 512 columns at a time.
    small = len(params) * width * hidden * params["up"].dtype.itemsize <= 8 << 20
    return TPUTiles(rows, hidden if small else 512)


def gpu_blocks(params: Params, num_assignments: int) -> GPUBlocks:
    """For N assignments. f32 operands fill shared memory twice as fast as bf16 ones."""
    tuned = _tuned(params, num_assignments)
    if tuned is not None:
        return GPUBlocks(*tuned)
    if params["up"].dtype.itemsize > 2:
        return GPUBlocks(rows=64, columns=64, step=32, warps=4)
    small = num_assignments // params["up"].shape[0] < 256
    return GPUBlocks(rows=64 if small else 128, columns=128, step=32, warps=4 if small else 8)


def _fitting(rows_per_expert: int) -> int:
    """Tiles of which an expert fills at least four, so that an eighth is padding on average."""
    return next((tile for tile in (512, 256) if rows_per_expert >= 4 * tile), 128)


def key(params: Params, num_assignments: int) -> str:
    """A shape's line in the table; the load of an expert counts by powers of two."""
    num_experts, width, hidden = params["up"].shape
    load = max(1, num_assignments // num_experts).bit_length()
    return f"{width},{hidden},{num_experts},{params['up'].dtype.name},2^{load}"


def _tuned(params: Params, num_assignments: int) -> list[Any] | None:
    path = table_path()
    table = _read(path, path.stat().st_mtime_ns) if path.exists() else {}
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return table.get(device.device_kind, {}).get(key(params, num_assignments))


@functools.cache
def _read(path: Path, modified: int) -> dict[str, dict[str, list[Any]]]:
    del modified
    return json.loads(path.read_text())
