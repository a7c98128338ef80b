"""Measures candidates for the tile sizes of the Pallas kernels."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from moe_diffusion.benchmarks.timing import medians
from moe_diffusion.kernels import tuning
from moe_diffusion.kernels.gpu.gpu import choose
from moe_diffusion.kernels.grouped import sorted_by_expert
from moe_diffusion.kernels.tpu.tpu import TPUKernels
from moe_diffusion.parallel.mesh import platform
from moe_diffusion.writing import save_text

Shape = tuple[int, int, int, int]


def candidates(params: dict[str, jax.Array]) -> list[tuple[Any, ...]]:
    """The tile sizes to try for these experts on the platform at hand.

    On a GPU of compute capability 9 some are for the Mosaic kernels (kernels/gpu/hopper.py).
    """
    hidden = params["up"].shape[-1]
    if platform() == "tpu":
        blocks = {hidden, *(size for size in (256, 512, 1024) if size < hidden)}
        return list(itertools.product((128, 256, 512), sorted(blocks)))
    blocks = [(64, 64, 32, 4), (64, 128, 32, 4), (128, 64, 32, 4), (128, 128, 32, 4)]
    blocks += [(128, 128, 32, 8), (128, 128, 64, 8), (128, 256, 32, 8)]
    if str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9."):
        blocks += _for_mosaic(params)
    return blocks


def _for_mosaic(params: dict[str, jax.Array]) -> list[tuple[Any, ...]]:
    """Blocks that Mosaic can run, with four warps for every 64 rows and four that copy."""
    from moe_diffusion.kernels.gpu.hopper import can_run

    blocks = [
        tuning.GPUBlocks(rows, columns, 64, rows // 16 + 4, "mosaic")
        for rows, columns in itertools.product((64, 128), (64, 128, 256))
    ]
    return [tuple(sizes) for sizes in blocks if can_run(params, sizes, sizes.rows)]


def best_tiles(
    shapes: Sequence[Shape], *, tokens: int, dtype: str, repeats: int
) -> Iterator[tuple[str, list[Any]]]:
    """Yields (`tuning.key`, the fastest candidate) for each shape.

    It times forward + backward with uniform routing. A candidate whose numbers differ from those of
    the first is left out, with a warning.
    """
    for shape in tqdm(shapes, desc="tune", unit="shape", disable=None):
        width, hidden, num_experts, top_k = shape
        params = _params(width, hidden, num_experts, dtype)
        calls, expected = {}, None
        for sizes in candidates(params):
            call = _call(sizes, params, tokens, top_k)
            try:
                result = jax.block_until_ready(call())
            # The tiles do not fit into the device's fast memory, or break a rule of Mosaic.
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
                continue
            expected = result if expected is None else expected
            if agree(result, expected):
                calls[sizes] = call
            else:
                warnings.warn(f"{shape}: tiles {sizes} compute something else", stacklevel=2)
        seconds = medians(calls, repeats)
        best = min(seconds, key=seconds.get)
        yield tuning.key(params, tokens * top_k), list(best)


def agree(result: Any, expected: Any, tolerance: float = 0.03) -> bool:
    """Whether two trees of arrays agree up to `tolerance` times the largest value of each array."""

    def close(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() <= tolerance * jnp.abs(b).max()

    return all(bool(same) for same in jax.tree.leaves(jax.tree.map(close, result, expected)))


def merge(path: Path, device_kind: str, found: dict[str, list[Any]]) -> None:
    """Adds `found` to a table; it replaces entries for the same device and shapes."""
    table = tuning.read_table_of_tiles(path) if path.exists() else {}
    table[device_kind] = dict(sorted({**table.get(device_kind, {}), **found}.items()))
    save_text(json.dumps(table, indent=1, sort_keys=True) + "\n", path)


def _params(width: int, hidden: int, num_experts: int, dtype: str) -> dict[str, jax.Array]:
    sizes = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        name: jax.random.normal(key, (num_experts, *size), dtype) * size[0] ** -0.5
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def _call(sizes: Iterable[Any], params: dict[str, jax.Array], tokens: int, top_k: int) -> Any:
    """A function without arguments that runs forward and backward with these tiles."""
    num_experts, width, _ = params["up"].shape
    if platform() == "tpu":
        kernels, tile = TPUKernels(tuning.TPUTiles(*sizes).hidden), next(iter(sizes))
    else:
        kernels, tile = choose(tuning.GPUBlocks(*sizes)), next(iter(sizes))
    x = jax.random.normal(jax.random.key(1), (tokens, width), params["up"].dtype)
    token = jnp.repeat(jnp.arange(tokens), top_k)
    expert = jax.random.randint(jax.random.key(2), token.shape, 0, num_experts)
    weight = jnp.ones(token.shape)

    @jax.jit
    def run(x, weight, params):
        def layer(x, weight, params):
            arrays = (x, token, expert, weight)
            return sorted_by_expert(kernels, tile, *arrays, params, "swiglu", top_k)

        y, pull = jax.vjp(layer, x, weight, params)
        return y, pull(y)

    return partial(run, x, weight, params)
