"""Weights without a run around them, written and read array by array.

A folder that `write_weights` made looks like a workdir whose run keeps no averages, so whatever
reads a workdir's weights reads it: `sample`, `evaluate`, `train --config.init_from=`. Here an array
may be larger than the memory at hand: it is stored in chunks, one for every piece it is made of,
uncompressed, so that writing costs what the disk costs.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import unflatten_dict

_THREADS = 4  # each reads a chunk, arranges and writes it, and waits for the disk
_TILE = 128  # columns of a transpose that are copied at once: what a cache holds


class Pieces(NamedTuple):
    """An array that exists only piece by piece.

    Attributes:
      read: yields (index, piece): array[index] = piece. All indices are equally long, and every
        element is in one piece. A piece may be a view of a mapped file: several threads read it
        in, each another piece.
      done: called with the bytes of each piece that is on its way to the disk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]
    done: Callable[[int], None]


class _PiecesHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Pieces` as what orbax reads back as any other array."""

    def memory_size(self, values: Sequence[_Boxed]) -> Sequence[tuple[int, int]]:
        return [(0, 0)] * len(values)

    async def serialize(
        self, values: Sequence[_Boxed], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        with _ChunkWriter() as writer:
            for boxed, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                _write(boxed.pieces, os.fspath(info.parent_dir / info.name), writer)
        return []


class _Boxed:
    """Keeps `Pieces`, a tuple, from being taken for a subtree."""

    def __init__(self, pieces: Pieces):
        self.pieces = pieces


def write_weights(workdir: str | os.PathLike, leaves: Mapping[str, Pieces]) -> None:
    """Writes workdir/checkpoints/0 of arrays named "params/..." and "router_state/..."."""
    step = Pieces((), np.dtype(np.int32), lambda: iter([((), np.int32(0))]), lambda size: None)
    tree = unflatten_dict({k: _Boxed(v) for k, v in {"step": step, **leaves}.items()}, sep="/")
    tree = {"router_state": {}, "emas": {}, "opt_state": {}} | tree
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Boxed, _PiecesHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
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


def _write(pieces: Pieces, path: str, writer: _ChunkWriter) -> None:
    """Writes one zarr array in chunks of a piece each."""
    created = False
    for index, piece in pieces.read():
        if not created:
            _create(pieces, path, (1,) * len(index) + piece.shape)
            created = True
        # A chunk is called by its place in the grid of chunks; an array without axes is chunk 0.
        place = ".".join(map(str, index + (0,) * piece.ndim)) or "0"
        writer.submit(os.path.join(path, place), piece, pieces.dtype)
        pieces.done(piece.size * pieces.dtype.itemsize)


class _ChunkWriter(contextlib.AbstractContextManager):
    """Writes chunks as zarr has them uncompressed, in C order, several at a time."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(_THREADS)
        self._flying: collections.deque[Future] = collections.deque()
        self._own = threading.local()

    def submit(self, path: str, piece: np.ndarray, dtype: np.dtype) -> None:
        """Waits while twice as many chunks as threads are on their way."""
        while len(self._flying) >= 2 * _THREADS:
            self._flying.popleft().result()
        self._flying.append(self._pool.submit(self._write, path, piece, dtype))

    def __exit__(self, *error) -> None:
        self._pool.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            for write in self._flying:
                write.result()

    def _write(self, path: str, piece: np.ndarray, dtype: np.dtype) -> None:
        chunk = self._buffer(piece.size * dtype.itemsize).view(dtype).reshape(piece.shape)
        for start in range(0, piece.shape[-1] if piece.ndim else 1, _TILE):
            columns = (..., slice(start, start + _TILE)) if piece.ndim else ()
            chunk[columns] = piece[columns]
        data = chunk.reshape(-1).view(np.uint8).data
        with open(path, "wb", buffering=0) as file:
            written = _write_directly(file, data)
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file)

    def _buffer(self, size: int) -> np.ndarray:
        """Bytes of this thread, used again and again, which begin with a page of memory."""
        if len(getattr(self._own, "buffer", ())) < size:
            self._own.buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        return self._own.buffer[:size]


def _write_directly(file: io.FileIO, data: memoryview) -> int:
    """Writes whole pages past the page cache, which costs most of the time; how many bytes.

    Zero where the platform or the file system cannot, or where something is wrong with the disk:
    an ordinary write tells.
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
            # Or else the chunks of an array of zeros would be missing.
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()
