"""Tile sizes of the grouped kernels, by kind of device and shape.

`python -m moe_diffusion.tune` measures candidates on the device at hand. It writes the best of each
shape into tiles.json beside this file, or into the file that MOE_DIFFUSION_TILES names. A shape
that is not in this table follows the rules below.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_diffusion import reading
from moe_diffusion.errors import UserError, shown
from moe_diffusion.kernels.mlp import Params


class TPUTiles(NamedTuple):
    """rows: of a tile. hidden: columns of the experts' hidden width that are taken at a time."""

    rows: int
    hidden: int


class GPUBlocks(NamedTuple):
    """rows of a tile, columns that a program makes, step along the summed axis, warps.

    kernels: "triton" (gpu/triton.py) or "mosaic" (gpu/hopper.py, where the number of warps follows
    from the rows). No rule below chooses "mosaic"; see gpu/hopper.py for its status.
    """

    rows: int
    columns: int
    step: int
    warps: int
    kernels: str = "triton"


def table_path() -> Path:
    return Path(os.environ.get("MOE_DIFFUSION_TILES") or Path(__file__).with_name("tiles.json"))


def tpu_tiles(params: Params, num_assignments: int, slots: int | None = None) -> TPUTiles:
    """Tiles for N assignments; with `slots` per expert, such that the last tile is fullest."""
    tuned = _tuned(params, num_assignments)
    if tuned is not None:
        return TPUTiles(*tuned)
    num_experts, width, hidden = params["up"].shape
    if slots is not None:
        rows = min((512, 256, 128), key=lambda tile: -(-slots // tile) * tile)
    else:
        rows = _fitting(num_assignments // num_experts)
    # All weights of a small expert stay in VMEM; of a large one, 512 columns at a time.
    small = len(params) * width * hidden * params["up"].dtype.itemsize <= 8 << 20
    return TPUTiles(rows, hidden if small else 512)


def gpu_blocks(params: Params, num_assignments: int) -> GPUBlocks:
    """Blocks for N assignments; smaller ones in f32, which needs twice as much shared memory."""
    tuned = _tuned(params, num_assignments)
    if tuned is not None:
        return GPUBlocks(*tuned)
    if params["up"].dtype.itemsize > 2:
        return GPUBlocks(rows=64, columns=64, step=32, warps=4)
    small = num_assignments // params["up"].shape[0] < 256
    return GPUBlocks(rows=64 if small else 128, columns=128, step=32, warps=4 if small else 8)


def _fitting(rows_per_expert: int) -> int:
    """Rows of a tile such that an expert fills at least four; an eighth is padding on average."""
    return next((tile for tile in (512, 256) if rows_per_expert >= 4 * tile), 128)


def key(params: Params, num_assignments: int) -> str:
    """The key of a shape in the table; the average load of an expert is rounded to a power of 2."""
    num_experts, width, hidden = params["up"].shape
    load = max(1, num_assignments // num_experts).bit_length()
    return f"{width},{hidden},{num_experts},{params['up'].dtype.name},2^{load}"


def _tuned(params: Params, num_assignments: int) -> list[Any] | None:
    path = table_path()
    table = _read(path, path.stat().st_mtime_ns) if path.exists() else {}
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return table.get(device.device_kind, {}).get(key(params, num_assignments))


def read_table_of_tiles(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Kind of device -> key of a shape -> the values of a `TPUTiles` or `GPUBlocks`.

    Raises:
      UserError: the file holds something else.
    """
    remedy = "delete it, or name another by MOE_DIFFUSION_TILES"
    table = reading.read_table(path, remedy)
    for kind, shapes in table.items():
        reading.Key((dict,)).check(shapes, f"{path}: {kind}", remedy)
        for shape, sizes in shapes.items():
            named = f"{path}: {kind}: {shape}"
            reading.Key((list,), least=2, most=5).check(sizes, named, remedy)
            numbers, kernels = sizes[:4], sizes[4:]
            if len(sizes) == 3 or kernels not in ([], ["triton"], ["mosaic"]):
                raise UserError(f"{named} is {shown(sizes)}, not tiles of a kernel: {remedy}")
            for number in numbers:
                reading.Key((int,), least=1, most=1 << 16).check(number, named, remedy)
    return table


@functools.cache
def _read(path: Path, modified: int) -> dict[str, dict[str, list[Any]]]:
    del modified
    return read_table_of_tiles(path)
