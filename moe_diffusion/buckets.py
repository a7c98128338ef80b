"""Buckets of images of one shape: whose turn it is, and a model for each shape.

A source whose images are not all of one shape has the attribute `buckets`: the shape (H, W, C) and
the number of images of each bucket. Its records lie bucket by bucket in that order. A batch has
images of one bucket.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from moe_diffusion.conditions import IMAGE
from moe_diffusion.errors import UserError

Shape = tuple[int, int, int]  # (H, W, C)


class Bucket(NamedTuple):
    """The images of one shape of a source."""

    shape: Shape
    count: int


def buckets_of(source: Any) -> tuple[Bucket, ...]:
    """The buckets of a source; a source that names none is one bucket."""
    if hasattr(source, "buckets"):
        return tuple(Bucket(tuple(shape), count) for shape, count in source.buckets)
    return (Bucket(tuple(getattr(source, "image_shape", ())), len(source)),)


def records_of(source: Any, shape: Shape) -> range:
    """The numbers of the records whose images have a shape."""
    first = 0
    for bucket in buckets_of(source):
        if bucket.shape == tuple(shape):
            return range(first, first + bucket.count)
        first += bucket.count
    return range(0)


def sized(model: Any, shape: Shape) -> Any:
    """The same network for images [H, W, C] of another size; its parameters stay what they are."""
    shape = tuple(shape)
    same = tuple(getattr(model, "input_shape", shape)) == shape
    return model if same else model.clone(input_shape=shape)


class Order(NamedTuple):
    """Which records the global batches have.

    Every bucket is an endless sequence of permutations of its images, one per epoch, of which a
    batch takes the next `batch_size`. The buckets take turns in proportion to their images: as long
    as one bucket has done an epoch, so have the others, but for a batch or two.

    Attributes:
      counts: images of each bucket.
      batch_size: G, images of a global batch. Of several buckets those with fewer than G images are
        left out.
      seed: of the permutations and of the turns.
    """

    counts: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def used(self) -> tuple[int, ...]:
        """Images of each bucket, 0 if it is left out."""
        alone = len(self.counts) == 1
        return tuple(n if alone or n >= self.batch_size else 0 for n in self.counts)

    def records(self, number: int, block: range) -> np.ndarray:
        """The numbers i64[B] of the records at the places `block` in global batch `number`."""
        bucket, number = self.turn(number)
        first = number * self.batch_size
        start, stop, parts = first + block.start, first + block.stop, []
        while start < stop:
            epoch, offset = divmod(start, self.counts[bucket])
            order = _permutations(self.counts, self.seed, epoch)[bucket]
            parts.append(order[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def turn(self, number: int) -> tuple[int, int]:
        """The bucket of global batch `number`, and which of the bucket's batches this is."""
        used = self.used
        if np.count_nonzero(used) == 1:
            return int(np.argmax(used)), number
        cycle, place = divmod(number, sum(used))
        batch, starts = _turns(used, self.seed, cycle)[place], np.cumsum((0, *used))
        bucket = int(np.searchsorted(starts, batch, side="right")) - 1
        return bucket, cycle * used[bucket] + int(batch - starts[bucket])


def order_of(source: Any, batch_size: int, seed: int) -> Order:
    """The order of a source's records.

    Raises:
      UserError: every one of several buckets has fewer images than a batch.
    """
    order = Order(tuple(count for _, count in buckets_of(source)), batch_size, seed)
    if not any(order.used):
        raise UserError(
            f"data.batch_size = {batch_size} exceeds the images of every bucket; the largest has "
            f"{max(order.counts)}: lower it, or prepare fewer sizes"
        )
    return order


@lru_cache(maxsize=3)  # a batch touches at most two epochs unless it exceeds the data
def _permutations(counts: tuple[int, ...], seed: int, epoch: int) -> list[np.ndarray]:
    """Order of the records of each bucket in one epoch; 25 ms for 1.3 million records."""
    rng = np.random.Generator(np.random.Philox([seed, epoch]))
    firsts = np.cumsum((0, *counts))
    return [rng.permutation(n) + first for n, first in zip(counts, firsts, strict=False)]


@lru_cache(maxsize=2)
def _turns(used: tuple[int, ...], seed: int, cycle: int) -> np.ndarray:
    """The order of the batches of one cycle, in which a bucket of n images has n batches.

    Batch i of a bucket comes at a random moment between i / n and (i + 1) / n of the cycle. Batches
    are numbered bucket by bucket.
    """
    rng = np.random.Generator(np.random.Philox([seed, cycle, 1]))
    moments = [(np.arange(n) + rng.random(n)) / n for n in used if n]
    return np.argsort(np.concatenate(moments), kind="stable")


class CompiledPerShape:
    """A training step that is called as before, and says so when it compiles for another shape.

    The first shape is that of `trace`, after which the caller compiles.

    Args:
      train_step: (state, batch, ...) -> result, of `jax.jit`.
      progress: see `progress.Progress`; compiling does not count as training.
    """

    def __init__(self, train_step: Any, progress: Any):
        self._step, self._progress, self._known = train_step, progress, set()

    def trace(self, state: Any, batch: dict[str, Any], *args: Any) -> Any:
        """`trace` of the step."""
        self._known.add(batch[IMAGE].shape)
        return self._step.trace(state, batch, *args)

    def __call__(self, state: Any, batch: dict[str, Any], *args: Any) -> Any:
        shape = batch[IMAGE].shape
        if shape not in self._known:
            told = "x".join(map(str, shape[-3:]))
            with self._progress.compiling_for(f"images of shape {told}"):
                self.trace(state, batch, *args).lower().compile()  # jax keeps it for the call
        return self._step(state, batch, *args)
