"""Writes weights that come from no run, piece by piece.

`write_weights` makes a folder like the workdir of a run that keeps no averages. So all commands
that read the weights of a workdir read it, too: `sample`, `evaluate`, `train --config.init_from=`.
An array may be larger than the memory, because each of its pieces is a separate chunk on disk.
Chunks are not compressed, so that only the disk limits the speed.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import logging
import math
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import unflatten_dict

from moe_diffusion.handlers import tree_handler
from moe_diffusion.interop.tensors import Parts, Pieces

_THREADS = 4  # each reads a chunk, arranges and writes it, and waits for the disk
_TILE = 128  # columns of a transpose that are copied at once, so that they fit into a cache


class _PiecesHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Pieces` so that orbax reads them back like any other array."""

    def memory_size(self, values: Sequence[_Boxed]) -> Sequence[tuple[int, int]]:
        return [(0, 0)] * len(values)

    async def serialize(
        self, values: Sequence[_Boxed], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        with _ChunkWriter() as writer:
            for boxed, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                _write(boxed, os.fspath(info.parent_dir / info.name), writer)
        return []


class _Boxed:
    """Wraps `Pieces`, so that orbax does not take the tuple for a subtree."""

    def __init__(self, pieces: Pieces, done: Callable[[int], None]):
        self.pieces = pieces
        self.done = done


def write_weights(
    workdir: str | os.PathLike,
    leaves: Mapping[str, Pieces],
    done: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes workdir/checkpoints/0 of arrays named "params/..." and "router_state/...".

    Args:
      leaves: name -> array. Several threads read pieces at a time, so a piece may be a view of a
        mapped file that is not in memory yet.
      done: called for each piece that is on its way to the disk, with its size in bytes.
    """
    step = Pieces((), np.dtype(np.int32), lambda: iter([((), [((), np.int32(0))])]))
    boxed = {"step": _Boxed(step, lambda size: None)}
    boxed |= {name: _Boxed(pieces, done) for name, pieces in leaves.items()}
    tree = unflatten_dict(boxed, sep="/")
    tree = {"router_state": {}, "emas": {}, "opt_state": {}} | tree
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Boxed, _PiecesHandler())
    )
    handler = tree_handler(use_ocdbt=False, type_handler_registry=registry)
    folder = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    folder.mkdir(parents=True)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # orbax warns that it has nothing to merge
    try:
        with ocp.CheckpointManager(folder, item_handlers={"state": handler}, options=options) as m:
            m.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    finally:
        logger.setLevel(level)


def _write(boxed: _Boxed, path: str, writer: _ChunkWriter) -> None:
    """Writes one zarr array; each piece is one chunk."""
    pieces, created = boxed.pieces, False
    for index, parts in pieces.read():
        shape = pieces.shape[len(index) :]
        if not created:
            _create(pieces, path, (1,) * len(index) + shape)
            created = True
        # A chunk is named by its place in the grid of chunks; an array without axes is chunk 0.
        place = ".".join(map(str, index + (0,) * len(shape))) or "0"
        writer.submit(os.path.join(path, place), shape, pieces.dtype, parts)
        boxed.done(math.prod(shape) * pieces.dtype.itemsize)


class _ChunkWriter(contextlib.AbstractContextManager):
    """Writes uncompressed zarr chunks, in C order, several at a time."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(_THREADS)
        self._flying: collections.deque[Future] = collections.deque()
        self._own = threading.local()

    def submit(self, path: str, shape: tuple[int, ...], dtype: np.dtype, parts: Parts) -> None:
        """Queues a chunk to write; first waits while two chunks per thread are in the queue."""
        while len(self._flying) >= 2 * _THREADS:
            self._flying.popleft().result()
        self._flying.append(self._pool.submit(self._write, path, shape, dtype, parts))

    def __exit__(self, *error) -> None:
        self._pool.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            for write in self._flying:
                write.result()

    def _write(self, path: str, shape: tuple[int, ...], dtype: np.dtype, parts: Parts) -> None:
        chunk = self._buffer(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        for place, part in parts:
            target = chunk[(*place, ...)]
            for start in range(0, part.shape[-1] if part.ndim else 1, _TILE):
                columns = (..., slice(start, start + _TILE)) if part.ndim else ()
                target[columns] = part[columns]
        data = chunk.reshape(-1).view(np.uint8).data
        with open(path, "wb", buffering=0) as file:
            written = _write_directly(file, data)
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file)

    def _buffer(self, size: int) -> np.ndarray:
        """A buffer that this thread uses again and again; it begins at a page, for O_DIRECT."""
        if len(getattr(self._own, "buffer", ())) < size:
            self._own.buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        return self._own.buffer[:size]


def _write_directly(file: io.FileIO, data: memoryview) -> int:
    """Writes the whole pages of data past the page cache, which would cost most of the time.

    Returns:
      The number of bytes written. It is 0 if the platform or the file system cannot do this, or if
      something is wrong with the disk; then an ordinary write shows the error.
    """
    whole = len(data) - len(data) % mmap.PAGESIZE
    if not whole or not hasattr(os, "O_DIRECT"):
        return 0
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        return file.write(data[:whole])
    except OSError:
        return 0
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)


def _create(pieces: Pieces, path: str, chunks: tuple[int, ...]) -> tensorstore.TensorStore:
    return tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": path + "/"},
            "dtype": pieces.dtype.name,
            "metadata": {"shape": pieces.shape, "chunks": chunks, "compressor": None},
            # Otherwise the chunks of an array of zeros would be missing.
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()
