from __future__ import annotations

import argparse
import importlib.util

import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.interop import files

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}


def same(left, right):
    assert set(left) == set(right)
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    files.write_state_dict(STATE, path)
    same(files.read_state_dict(path), STATE)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]
    with pytest.raises(KeyError):
        files.read_state_dict(path)["c"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    files.write_state_dict(STATE, path)
    with pytest.raises(Exception, match="object"):
        files.write_state_dict({"a": np.array([object()])}, path)
    same(files.read_state_dict(path), STATE)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no weight file at .*w.safetensors"):
        files.read_state_dict(tmp_path / "w.safetensors")
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(UserError, match="w.bin: weight files end in"):
        files.read_state_dict(tmp_path / "w.bin")
    with pytest.raises(UserError, match="written as .safetensors"):
        files.write_state_dict(STATE, tmp_path / "w.pt")
    whole = tmp_path / "w.safetensors"
    files.write_state_dict(STATE, whole)
    with pytest.raises(UserError, match="holds one state dict"):
        files.read_state_dict(whole, "ema")
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        files.read_state_dict(whole)


def test_torch_files(tmp_path):
    """With PyTorch: what may be in a checkpoint. Without it: how to get it."""
    path = tmp_path / "w.pt"
    if importlib.util.find_spec("torch") is None:
        path.write_bytes(b"")
        with pytest.raises(UserError, match=r"pip install 'moe_diffusion\[torch\]'"):
            files.read_state_dict(path)
        return
    import torch

    state = {key: torch.from_numpy(value) for key, value in STATE.items()}
    torch.save(state, path)
    same(files.read_state_dict(path), STATE)
    torch.save(
        {"model": {**state, "c": torch.ones(2).bfloat16()}, "args": argparse.Namespace(lr=1)}, path
    )
    same(files.read_state_dict(path), STATE | {"c": np.ones(2, np.float32)})
    torch.save({"model": state, "ema": {"b": torch.zeros(1)}, "step": 3}, path)
    same(files.read_state_dict(path, "ema"), {"b": np.zeros(1, np.float32)})
    for weights, message in ((None, "choose weights= one of model, ema"), ("x", "has model, ema")):
        with pytest.raises(UserError, match=message):
            files.read_state_dict(path, weights)
    torch.save({"model": state, "code": test_errors}, path)
    with pytest.raises(UserError, match="damaged or holds more than weights"):
        files.read_state_dict(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        files.read_state_dict(path)
