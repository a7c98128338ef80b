"""Weights written piece by piece: on the disk lies what was given, however it lay before."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tensorstore

from moe_diffusion.errors import UserError
from moe_diffusion.interop import streamed
from moe_diffusion.interop.streamed import write_weights
from moe_diffusion.interop.tensors import Pieces
from moe_diffusion.training.checkpoint import StoredWeights


def pieces_of(array, axes, arrange=lambda piece: piece):
    """An array whose first `axes` axes are cut up."""

    def read():
        for index in np.ndindex(array.shape[:axes]):
            yield index, [((), arrange(array[index]))]

    return Pieces(array.shape, array.dtype, read)


def transposed_in_memory(piece):
    return np.ascontiguousarray(piece.T).T


@pytest.mark.parametrize("direct", [True, False])
def test_pieces_come_back(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    rng = np.random.default_rng(0)
    arrays = {
        "params/stacked": rng.normal(size=(3, 2, 129, 257)).astype(np.float32),  # not whole pages
        "params/vector": rng.normal(size=(2, 5)).astype(np.float32),
        "params/scalar": np.float32(3.5).reshape(()),
        "router_state/bias": np.zeros((1, 4), np.float32),
    }
    sizes = []
    leaves = {
        "params/stacked": pieces_of(arrays["params/stacked"], 2, transposed_in_memory),
        "params/vector": pieces_of(arrays["params/vector"], 1, lambda piece: piece[::-1][::-1]),
        "params/scalar": pieces_of(arrays["params/scalar"], 0),
        "router_state/bias": pieces_of(arrays["router_state/bias"], 1, np.float16),
    }
    write_weights(tmp_path, leaves, sizes.append)
    assert sorted(sizes) == [4, 4 * 4, 5 * 4, 5 * 4] + [129 * 257 * 4] * 6
    for name, array in arrays.items():
        path = str(tmp_path / "checkpoints" / "0" / "state" / name.replace("/", ".")) + "/"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}
        stored = tensorstore.open(spec).result().read().result()
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored, array)


def test_one_flipped_bit_in_any_file_is_noticed(tmp_path):
    """However it is read: whole, or block by block as for an export."""
    array = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    write_weights(tmp_path, {"params/w": pieces_of(array, 1)})
    folder = tmp_path / "checkpoints" / "0"
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]
    assert len(files) >= 3 + 4  # chunks; what describes them, the step and the tree
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for read in (
            lambda stored: stored.read({"params/w": None}),
            lambda stored: list(stored.read_blocks("params/w")),
        ):
            with (
                pytest.raises(UserError, match=f"{path.name} is not what was written"),
                StoredWeights(tmp_path) as stored,
            ):
                read(stored)
        path.write_bytes(whole)
    with StoredWeights(tmp_path) as stored:
        np.testing.assert_array_equal(stored.read({"params/w": None})["params/w"], array)


def test_a_disk_that_fails_is_told_of(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed.os, "fsync", full)
    leaves = {"params/w": pieces_of(np.ones((20, 3), np.float32), 1)}
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, leaves)
