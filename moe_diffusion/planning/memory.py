"""Memory of a device: what a compiled program takes, and the largest batch that still fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import jax


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by kind; `aliased` outputs reuse the memory of donated arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, analysis: Any) -> Memory:
        """Reads the result of XLA's `memory_analysis()`."""
        return cls(
            arguments=analysis.argument_size_in_bytes,
            outputs=analysis.output_size_in_bytes,
            aliased=analysis.alias_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
            code=analysis.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def times(self, devices: int) -> dict[str, int]:
        """Bytes by kind on a chip that has several devices."""
        return {kind: devices * value for kind, value in asdict(self).items()}


def sharded_bytes(arrays: Any) -> int:
    """Bytes that one device holds of a pytree of ShapeDtypeStructs with shardings."""

    def part(array: jax.ShapeDtypeStruct) -> int:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return 0
        shape = array.sharding.shard_shape(array.shape)
        return jax.ShapeDtypeStruct(shape, array.dtype).size * array.dtype.itemsize

    return sum(part(array) for array in jax.tree.leaves(arrays))


def batch_sizes() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: two sizes for each power of two, so that few are tried."""
    yield 1
    for power in count(1):
        yield 2**power
        yield 3 * 2 ** (power - 1)


def largest_batch(needed: Callable[[int], int | None], limit: int) -> int:
    """The largest of `batch_sizes` that needs at most `limit` bytes; 0 if not even 1 does.

    Every call of `needed` compiles a program, which is slow. So the next size to try is guessed
    from a line through the last two results.

    Args:
      needed: batch size -> bytes, which grow with it; None if too many, without a number.
      limit: bytes.
    """
    sizes = batch_sizes()
    ladder = [next(sizes) for _ in range(40)]
    low, high = -1, len(ladder)  # ladder[low] fits, ladder[high] does not
    seen: list[tuple[int, int]] = []
    guess = 0
    while high - low > 1:
        size = ladder[guess]
        used = needed(size)
        if used is not None:
            seen.append((size, used))
        if used is not None and used <= limit:
            low = guess
        else:
            high = guess
        guess = min(max(_next(seen, ladder, limit, guess + 2), low + 1), high - 1)
    return ladder[low] if low >= 0 else 0


def _next(seen: list[tuple[int, int]], ladder: list[int], limit: int, default: int) -> int:
    """Where on the ladder a line through the last two sizes reaches the limit."""
    if len(seen) < 2 or seen[-1][0] == seen[-2][0]:
        return default
    (x0, y0), (x1, y1) = sorted(seen[-2:])
    slope = max(1.0, (y1 - y0) / (x1 - x0))
    reach = x0 + (limit - y0) / slope
    return max((i for i, size in enumerate(ladder) if size <= reach), default=0)
