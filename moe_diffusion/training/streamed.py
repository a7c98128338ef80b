"""Weights without a run around them, written and read array by array.

A folder that `write_weights` made looks like a workdir whose run keeps no averages, so whatever
reads a workdir's weights reads it: `sample`, `evaluate`, `train --config.init_from=`. Here an array
may be larger than the memory at hand: it is stored in chunks, one for every piece it is made of,
uncompressed, so that writing costs what the disk costs.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import unflatten_dict

_IN_FLIGHT = 2  # chunks that are being written while the next is read


class Pieces(NamedTuple):
    """An array that exists only piece by piece.

    Attributes:
      read: yields (index, piece): array[index] = piece. All indices are equally long, and every
        element is in one piece.
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
        for boxed, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            _write(boxed.pieces, os.fspath(info.parent_dir / info.name))
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


def _write(pieces: Pieces, path: str) -> None:
    """Writes one zarr array in chunks of a piece each."""
    flying: collections.deque = collections.deque()
    store = None
    for index, piece in pieces.read():
        piece = np.asarray(piece, pieces.dtype)
        if store is None:
            store = _create(pieces, path, (1,) * len(index) + piece.shape)
        while len(flying) >= _IN_FLIGHT:
            flying.popleft().result()
        flying.append(store[index].write(piece))
        pieces.done(piece.nbytes)
    for write in flying:
        write.result()


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
