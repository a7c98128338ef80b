"""Source -> shuffled, repeated, augmented, checkpointable batches, for ever.

Batch number b of a run is a pure function of (source, seed, b): the records are positions
b*G .. (b+1)*G-1 of an endless sequence of permutations (one per epoch; G the global batch size),
and the augmentation draws from (seed, b). Everything else follows from that: the iterator's state
is one number, a resumed run sees the same data, and so does a run on other numbers of workers
or processes. grain supplies the seeded random map, prefetching and worker processes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from moe_diffusion.data.sources import Batch, Source, check_labels
from moe_diffusion.errors import UserError

AUGMENTATIONS = ("none", "flip", "dequantize")


def make_iterator(
    source: Source,
    data_config: Any,
    *,
    seed: int,
    batch_size_per_process: int,
    process_index: int,
    process_count: int,
) -> BatchIterator:
    """Endless training batches of one process.

    Every process receives its own contiguous block of each global batch, so that blocks laid side
    by side in the order of the processes are the batch that a single process would see. Within
    an epoch no record comes twice, on no process; a batch may straddle two epochs.

    Args:
      source: the records; see `sources`.
      data_config: `config.data`; reads `augment` (`AUGMENTATIONS`), `num_workers` (processes that
        read; 0 = threads of this one) and `prefetch` (batches made ahead; 0 = none).
      seed: of the order and of the augmentation; any integer.
      batch_size_per_process: B, records in a batch of this process.
      process_index: this process, 0..process_count-1.
      process_count: number of processes that share the global batch.

    Returns:
      Iterator of {"image": f32[B,H,W,C], "label": i32[B]}. `close` ends its threads and workers.

    Raises:
      UserError: `augment` is unknown or does not fit the source; while iterating, a label out of
        range.
    """
    if data_config.augment not in AUGMENTATIONS:
        raise UserError(
            f"data.augment={data_config.augment!r} is unknown; known: {', '.join(AUGMENTATIONS)}"
        )
    if data_config.augment == "dequantize" and getattr(source, "levels", None) is None:
        raise UserError("data.augment=dequantize needs a source of quantised images, like digits")
    flip, stored = data_config.augment == "flip", hasattr(source, "draw")
    if flip and stored and not source.record.flip:
        raise UserError("data.augment=flip needs latents of mirrored images: prepare with --flip")
    order_seed, augment_seed = _split_seed(seed)
    global_batch_size = batch_size_per_process * process_count
    block = slice(
        process_index * batch_size_per_process, (process_index + 1) * batch_size_per_process
    )
    read = functools.partial(
        _read_block, source=source, seed=order_seed, block=block, batch_size=global_batch_size
    )
    # 2**40 batches are "for ever" and keep every position below 2**63.
    batches = grain.MapDataset.range(2**40).map(read)
    if stored:
        batches = batches.random_map(_Draw(source, block, flip), seed=augment_seed)
    elif flip:
        batches = batches.random_map(_Flip(global_batch_size, block), seed=augment_seed)
    elif data_config.augment == "dequantize":
        transform = _Dequantize(global_batch_size, block, source.levels)
        batches = batches.random_map(transform, seed=augment_seed)
    return BatchIterator(batches, data_config.num_workers, data_config.prefetch)


def full_batches(source: Source, batch_size: int) -> Iterator[Batch]:
    """All records once, in order, as they are; the last batch may be shorter."""
    for start in range(0, len(source), batch_size):
        yield _take(source, np.arange(start, min(start + batch_size, len(source))))


class BatchIterator(grain.DatasetIterator):
    """Iterates over a dataset of batches; its state is the number of batches handed out.

    grain's own iterators keep a state per worker process, which a run with another `num_workers`
    cannot read. Here the dataset is cut at that number instead, and prefetching starts afresh.
    """

    def __init__(self, batches: grain.MapDataset, num_workers: int, prefetch: int):
        super().__init__()
        self._batches = batches
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._next_index = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._reader)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next_index = int(state["next_index"])

    def start_prefetch(self) -> None:
        """Begins to read ahead in the background; `next` does so by itself."""
        if self._reader is not None:
            return
        rest = self._batches.slice(slice(self._next_index, None))
        dataset = rest.to_iter_dataset(grain.ReadOptions(self._prefetch, self._prefetch))
        if self._num_workers > 0:
            if not flags.FLAGS.is_parsed():  # outside of absl.app; grain's workers read flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, max(1, self._prefetch))
            )
        self._reader = iter(dataset)
        self._reader.start_prefetch()

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def _split_seed(seed: int) -> tuple[int, int]:
    """Two independent seeds below 2**32, of the order and of the augmentation."""
    order, augment = np.random.SeedSequence(seed % 2**64).generate_state(2)
    return int(order), int(augment)


@functools.lru_cache(maxsize=2)  # a batch touches at most two epochs unless it exceeds the data
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the records in one epoch. 1.3 million records take 25 ms once an epoch."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(size)


def _records_at(start: int, stop: int, size: int, seed: int) -> np.ndarray:
    """Indices of the records at positions start..stop-1 of the endless sequence of epochs."""
    parts = []
    while start < stop:
        epoch, offset = divmod(start, size)
        parts.append(_permutation(size, seed, epoch)[offset : offset + stop - start])
        start += len(parts[-1])
    return np.concatenate(parts)


def _read_block(number: int, *, source: Source, seed: int, block: slice, batch_size: int) -> Batch:
    """One process's block of global batch `number`."""
    first = number * batch_size
    indices = _records_at(first + block.start, first + block.stop, len(source), seed)
    return _take(source, indices, stored=hasattr(source, "draw"))


def _take(source: Source, indices: np.ndarray, stored: bool = False) -> Batch:
    if stored:
        batch = source.take_stored(indices)
    elif hasattr(source, "take"):
        batch = source.take(indices)
    else:
        records = [source[int(i)] for i in indices]
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    check_labels(batch["label"], indices, source.num_classes)
    return batch


@dataclasses.dataclass(frozen=True)
class _Draw(grain.transforms.RandomMap):
    """Draws latents from what is stored, see `latents.Latents.draw`."""

    source: Source
    block: slice
    flip: bool

    def random_map(self, batch: Batch, rng: np.random.Generator) -> Batch:
        positions = range(self.block.start, self.block.stop)
        seed = int(rng.integers(2**63))
        image = self.source.draw(batch["stored"], positions, seed, self.flip)
        return {"image": image, "label": batch["label"]}


@dataclasses.dataclass(frozen=True)
class _Flip(grain.transforms.RandomMap):
    """Mirrors left and right with probability one half."""

    global_batch_size: int  # drawn for all processes: their number must not change the numbers
    block: slice

    def random_map(self, batch: Batch, rng: np.random.Generator) -> Batch:
        flip = (rng.random(self.global_batch_size) < 0.5)[self.block, None, None, None]
        image = batch["image"]
        return {**batch, "image": np.where(flip, image[:, :, ::-1], image)}


@dataclasses.dataclass(frozen=True)
class _Dequantize(grain.transforms.RandomMap):
    """Adds uniform noise of half a grey level to either side; a level is 2 / (levels - 1) wide.

    Spreads the few values of quantised images into a density (Theis et al., 2016, section 3.1).
    Black and white reach half a level beyond [-1, 1]; clipping would pile them up there again.
    """

    global_batch_size: int
    block: slice
    levels: int

    def random_map(self, batch: Batch, rng: np.random.Generator) -> Batch:
        image = batch["image"]
        shape = (self.global_batch_size, *image.shape[1:])
        noise = rng.random(shape, dtype=np.float32)[self.block]
        return {**batch, "image": image + (2 * noise - 1) / (self.levels - 1)}
