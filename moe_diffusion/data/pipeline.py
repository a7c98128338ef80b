"""Makes endless batches of a source: shuffled, augmented, and resumable at any batch.

Batch b of a run is a pure function of (source, seed, b). Its records are the positions
b*G .. (b+1)*G-1 of an endless sequence of permutations, one per epoch, where G is the size of the
global batch. Of a source with images of several shapes every bucket has such a sequence, and they
take turns (`buckets.Order`). The augmentation draws from (seed, b). Therefore the iterator's state
is one number, a resumed run sees the same data, and so does a run with another number of workers or
processes. grain supplies the seeded random map, the prefetching and the worker processes.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import grain
import numpy as np

from moe_diffusion import workers
from moe_diffusion.buckets import Order, order_of
from moe_diffusion.checks import divides
from moe_diffusion.data.sources import Batch, Source, check_batch, stack
from moe_diffusion.errors import UserError

AUGMENTATIONS = ("none", "flip", "dequantize")


def make_iterator(
    source: Source, data: Any, *, seed: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Makes the endless training batches of one process.

    Each process receives one contiguous block of each global batch. The blocks in the order of
    the processes are the batch that a single process would see. No record comes twice in an epoch,
    whatever the number of processes. A batch may reach from one epoch into the next. All its images
    have one shape.

    Args:
      source: the records; see `sources`.
      data: `config.data`; reads `batch_size` (G, of the global batch), `augment`
        (`AUGMENTATIONS`; "flip" of latents without mirrored images warns and does nothing),
        `num_workers` (processes that read; 0 = threads of this one) and
        `prefetch` (batches made ahead; 0 = none).
      seed: of the order and of the augmentation; any integer.
      process_index: this process, 0..process_count-1.
      process_count: number of processes that share the global batch.

    Returns:
      Iterator of {"image": f32[B, H, W, C], **cond}, where B = G / process_count and cond has the
      fields [B, ...] of `source.cond_spec`. `close` ends its threads and workers.

    Raises:
      UserError: the processes cannot share the batch evenly; there are far more workers than
        cores; `augment` is unknown or does not fit the source; see `buckets.order_of`. While
        iterating: a record does not have the fields that the source promises, or a value is out of
        range; the workers run out of memory or of room in /dev/shm.
    """
    workers.check_count(data.num_workers)
    augment, size = data.augment, data.batch_size // process_count
    remedy = "make the batch a multiple"
    divides("number of processes", process_count, "data.batch_size", data.batch_size, remedy)
    if augment not in AUGMENTATIONS:
        raise UserError(f"data.augment={augment!r} is unknown; known: {', '.join(AUGMENTATIONS)}")
    if augment == "dequantize" and getattr(source, "levels", None) is None:
        raise UserError("data.augment=dequantize needs a source of quantised images, like digits")
    if augment == "flip" and not getattr(source, "mirrored", True) and process_index == 0:
        logging.warning(
            "data.source has no mirrored images, so data.augment=flip does nothing; to add them, "
            "run `python -m moe_diffusion.prepare` again with another --out and without --no-flip"
        )
    # Two independent seeds: one for the order, one for the augmentation.
    order_seed, augment_seed = np.random.SeedSequence(seed % 2**64).generate_state(2).tolist()
    positions = range(process_index * size, (process_index + 1) * size)
    block = _Block(source, order_of(source, data.batch_size, order_seed), augment, positions)
    # 2**40 batches are "for ever" and keep every position below 2**63.
    batches = grain.MapDataset.range(2**40).map(block.read)
    batches = batches.random_map(block.augmented, seed=augment_seed)
    return BatchIterator(batches, data.num_workers, data.prefetch)


class BatchIterator(grain.DatasetIterator):
    """Iterates over a dataset of batches; its state is the number of batches handed out.

    grain's own iterators keep a state per worker process, which a run with another `num_workers`
    cannot read. This iterator drops the first batches of the dataset instead and starts to
    prefetch at the next one.
    """

    def __init__(self, batches: grain.MapDataset, num_workers: int, prefetch: int):
        super().__init__()
        self._batches, self._num_workers, self._prefetch = batches, num_workers, prefetch
        self._next_index = 0
        self._reader: grain.DatasetIterator | workers.Reader | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        with workers.shortages_explained():
            if self._reader is None:
                self._reader = self._start()
            batch = next(self._reader)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next_index = int(state["next_index"])

    def close(self) -> None:
        self._stop()
        super().close()

    def _start(self) -> grain.DatasetIterator | workers.Reader:
        """Begins to read ahead in the background, from the next batch on."""
        options = grain.ReadOptions(self._prefetch, self._prefetch)
        dataset = self._batches[self._next_index :].to_iter_dataset(options)
        if self._num_workers > 0:
            ahead = max(1, self._prefetch)
            return workers.Reader(dataset, self._num_workers, ahead)
        reader = iter(dataset)
        reader.start_prefetch()
        return reader

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


class _Block(NamedTuple):
    """The block of every global batch that one process makes.

    Attributes:
      source: the records.
      order: of the records.
      augment: one of `AUGMENTATIONS`.
      positions: of the block in the global batch.
    """

    source: Source
    order: Order
    augment: str
    positions: range

    def read(self, number: int) -> Batch:
        """The records of global batch `number`; of a source with `draw`, as they are stored."""
        source, indices = self.source, self.order.records(number, self.positions)
        if hasattr(source, "draw"):
            batch = source.take_stored(indices)
        elif hasattr(source, "take"):
            batch = source.take(indices)
        else:
            batch = stack([source[int(i)] for i in indices])
        check_batch(batch, indices, getattr(source, "stored_spec", source.cond_spec))
        return batch

    def augmented(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The batch with images as the model sees them.

        "flip" mirrors left and right with probability one half.

        "dequantize" adds uniform noise of up to half a grey level; a level is 2 / (levels - 1)
        wide. The noise turns the few values of quantised images into a density (Theis et al.,
        2016, section 3.1). Black and white reach half a level beyond [-1, 1]. They are not
        clipped, because that would pile them up at -1 and 1 again.

        Both draw for all G images of the global batch and keep their block of it, so that the
        number of processes does not change what is drawn. A source with `draw` sees to that itself.
        """
        image, mine = batch["image"], slice(self.positions.start, self.positions.stop)
        total = self.order.batch_size
        if hasattr(self.source, "draw"):
            seed = int(rng.integers(2**63))
            image = self.source.draw(image, self.positions, seed, self.augment == "flip")
            if hasattr(self.source, "draw_captions"):
                batch = self.source.draw_captions(batch, self.positions, seed)
        elif self.augment == "flip":
            flip = (rng.random(total) < 0.5)[mine, None, None, None]
            image = np.where(flip, image[:, :, ::-1], image)
        elif self.augment == "dequantize":
            noise = rng.random((total, *image.shape[1:]), dtype=np.float32)[mine]
            image = image + (2 * noise - 1) / (self.source.levels - 1)
        return {**batch, "image": image}
