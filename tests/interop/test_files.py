from __future__ import annotations

import argparse
import importlib.util
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_diffusion.errors import UserError
from moe_diffusion.interop import files, keymap
from tests.interop import torch_file

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
    with pytest.raises(Exception, match="dtype object cannot be stored"):
        files.write_state_dict({"a": np.array([object()])}, path)
    same(files.read_state_dict(path), STATE)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no weight file at .*w.safetensors"):
        files.read_state_dict(tmp_path / "w.safetensors")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(UserError, match="w.h5: weight files end in"):
        files.read_state_dict(tmp_path / "w.h5")
    with pytest.raises(UserError, match="written as .safetensors"):
        files.write_state_dict(STATE, tmp_path / "w.pt")
    whole = tmp_path / "w.safetensors"
    files.write_state_dict(STATE, whole)
    with pytest.raises(UserError, match="holds one state dict"):
        files.read_state_dict(whole, "ema")
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        files.read_state_dict(whole)


def test_every_dtype_is_read_as_it_is(tmp_path):
    dtypes = [np.dtype(dtype) for dtype in files.DTYPES.values()]
    values = np.array([[0, 1, 100], [2, 3, 1]])
    state = {dtype.name: values.astype(dtype) for dtype in dtypes}
    path = tmp_path / "w.safetensors"
    files.write_state_dict(state | {"empty": np.empty((0, 3), np.float32)}, path)
    found = files.read_state_dict(path)
    for name, array in state.items():
        assert found[name].dtype == name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert found["empty"].shape == (0, 3)


def test_a_dtype_that_numpy_has_not(tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="a is F8_E4M3; readable are F64, F32, F16"):
        files.read_state_dict(path)


def test_shards_are_one_state_dict(tmp_path):
    files.write_state_dict({"a.weight": STATE["a.weight"]}, tmp_path / "w-1.safetensors")
    files.write_state_dict({"b": STATE["b"]}, tmp_path / "w-2.safetensors")
    index = tmp_path / "w.safetensors.index.json"
    table = {"a.weight": "w-1.safetensors", "b": "w-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for path in (index, tmp_path):  # a folder stands for the one index, or the one file, in it
        state = files.read_state_dict(path)
        same(state, STATE)
        float32 = np.dtype(np.float32)
        assert state.specs == {"a.weight": ((2, 3), float32), "b": ((1,), float32)}
    (tmp_path / "w-2.safetensors").unlink()
    with pytest.raises(UserError, match="shards that are not beside it: w-2.safetensors"):
        files.read_state_dict(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="no index of shards"):
        files.read_state_dict(index)


def test_shards_without_an_index(tmp_path):
    """A folder of them, or one of them, stands for all; none may be lacking."""
    parts = [{"a.weight": STATE["a.weight"]}, {"b": STATE["b"]}]
    for number, part in enumerate(parts, 1):
        files.write_state_dict(part, tmp_path / f"w-{number:05}-of-00002.safetensors")
    one = tmp_path / "w-00002-of-00002.safetensors"
    for path in (tmp_path, one):
        same(files.read_state_dict(path), STATE)
    files.write_state_dict(parts[0], one)
    with pytest.raises(UserError, match="a.weight is in another shard, too"):
        files.read_state_dict(tmp_path)
    one.rename(tmp_path / "v-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="holds the shards of several files: name one of them"):
        files.read_state_dict(tmp_path)
    (tmp_path / "v-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="shards that are not beside it: w-00002-of-00002.saf"):
        files.read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../w-1.safetensors"}, "weight_map: '../w-1.safetensors' is no plain name"),
        ({"a": "/etc/passwd"}, "is no plain name of a file beside it"),
        ({"a": None}, "weight_map.a is None, not text: it is no index of shards"),
        ({"a": ["w-1.safetensors"]}, "weight_map.a is .'w-1.safetensors'., not text"),
        ({}, "names shards that are not beside it: none"),
        ([], "weight_map is .., not a table"),
    ],
)
def test_indices_that_are_none(table, message, tmp_path):
    (tmp_path / "w-1.safetensors").write_bytes(b"")
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=message):
        files.read_state_dict(index)


def test_an_average_beside_the_live_weights(tmp_path):
    """Under the prefixes of Lightning and of ema_pytorch, which also keeps a step."""
    path = tmp_path / "w.safetensors"
    average = {key: value + 1 for key, value in STATE.items()}
    for live in ("model.", "online_model.", ""):
        state = {f"ema_model.{key}": value for key, value in average.items()}
        state |= {f"{live}{key}": value for key, value in STATE.items()}
        files.write_state_dict(state | {"step": np.array(3), "initted": np.array(True)}, path)
        for weights, wanted, entry in (
            (None, average, "ema_model"), ("ema", average, "ema_model"), ("model", STATE, "model"),
        ):  # fmt: skip
            opened = files.open_weights(path, weights)
            same({keymap.bare(key): opened.state[key] for key in opened.state}, wanted)
            assert opened.entry == entry
        with pytest.raises(UserError, match="no state dict 'best'; choose weights= ema or model"):
            files.open_weights(path, "best")
    torch_file.save(tmp_path / "l.ckpt", {"state_dict": state, "epoch": 3})
    for weights, wanted in ((None, average), ("ema", average), ("model", STATE)):
        opened = files.open_weights(tmp_path / "l.ckpt", weights)
        same({keymap.bare(key): opened.state[key] for key in opened.state}, wanted)
    files.write_state_dict({f"ema_model.{key}": value for key, value in STATE.items()}, path)
    assert files.open_weights(path).entry is None


def test_what_is_no_regular_file(tmp_path):
    for name in ("w.safetensors", "w.pt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a device or pipe: name a regular file"):
            files.read_state_dict(tmp_path / name)
    (tmp_path / "w.pt").unlink()
    with pytest.raises(UserError, match="w.safetensors is a device or pipe"):
        files.read_state_dict(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="should hold one weight file; it holds none"):
        files.read_state_dict(tmp_path)
    for name in ("v.safetensors", "w.safetensors"):
        files.write_state_dict(STATE, tmp_path / name)
    with pytest.raises(UserError, match="it holds v.safetensors, w.safetensors: name a file"):
        files.read_state_dict(tmp_path)
    (tmp_path / "v.safetensors").unlink()
    same(files.read_state_dict(tmp_path), STATE)


def test_a_folder_of_several_networks(tmp_path):
    """As diffusers publishes them; one of the networks is in shards."""
    shard = tmp_path / "transformer" / "w-1.safetensors"
    files.write_state_dict({"b": STATE["b"]}, shard)
    index = shard.with_name("w.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"b": shard.name}}))
    files.write_state_dict(STATE, tmp_path / "vae" / "w.safetensors")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    same(
        files.read_state_dict(tmp_path),
        {"transformer/b": STATE["b"]} | {f"vae/{key}": x for key, x in STATE.items()},
    )
    assert files.find(tmp_path, "transformer") == index
    assert files.find(tmp_path / "vae", "transformer").name == "w.safetensors"


def test_every_dtype_and_layout_is_written(tmp_path):
    state = {
        "transposed": STATE["a.weight"].T,
        "bf16": np.arange(3).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False]),
    }
    files.write_state_dict(state, tmp_path / "w.safetensors")
    back = load_file(tmp_path / "w.safetensors")
    same(back, state)
    assert {key: value.dtype for key, value in back.items()} == {
        k: v.dtype for k, v in state.items()
    }


def test_parts_make_one_tensor(tmp_path):
    path = tmp_path / "w.safetensors"
    with files.safetensors_writer(path, {"w": ((4, 2), np.dtype(np.float32))}) as write:
        write("w", np.full((3, 2), 2, np.float32), start=1)
        write("w", np.full((1, 2), 1, np.float32), start=0)
        with pytest.raises(ValueError, match=r"w is \(4, 2\): no room for \(2, 2\) at 3"):
            write("w", np.zeros((2, 2), np.float32), start=3)
        with pytest.raises(ValueError, match=r"no room for \(4, 3\) at 0"):
            write("w", np.zeros((4, 3), np.float32))
    np.testing.assert_array_equal(load_file(path)["w"], [[1, 1], [2, 2], [2, 2], [2, 2]])


def test_parts_along_any_axis(tmp_path):
    path, whole = tmp_path / "w.safetensors", np.arange(2 * 3 * 5 * 2.0).reshape(2, 3, 5, 2)
    specs = {name: (whole.shape, np.dtype(np.float16)) for name in "abcd"}
    with files.safetensors_writer(path, specs) as write:
        for axis, name in enumerate(specs):
            size = whole.shape[axis]
            for start, stop in ((1, size), (0, 1)):
                write(name, whole.take(range(start, stop), axis), axis, start)
    for tensor in load_file(path).values():
        np.testing.assert_array_equal(tensor, whole)


def test_torch_files(tmp_path):
    """What PyTorch itself writes; see test_pickled.py, too. Without it: how to get it."""
    path = tmp_path / "w.pt"
    if importlib.util.find_spec("torch") is None:
        path.write_bytes(b"")
        with pytest.raises(UserError, match=r"before 1.6, .* pip install 'moe_diffusion\[torch\]'"):
            files.read_state_dict(path)
        return
    import torch

    state = {key: torch.from_numpy(value) for key, value in STATE.items()}
    half = {"b": torch.zeros(1).bfloat16(), "p": torch.nn.Parameter(torch.ones(2))}
    for legacy in (False, True):  # legacy: before PyTorch 1.6
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        same(files.read_state_dict(path), STATE)
    everything = {"model": state, "model_ema1": half, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(everything | {"args": argparse.Namespace(lr=1, model="JiT-B/16")}, path)
    same(files.read_state_dict(path, "model"), STATE)
    for weights in (None, "ema", "model_ema1"):
        opened = files.open_weights(path, weights)
        same(opened.state, {"b": np.zeros(1, np.float32), "p": np.ones(2, np.float32)})
        specs = {key: (spec.shape, spec.dtype.name) for key, spec in opened.state.specs.items()}
        assert specs == {"b": ((1,), "bfloat16"), "p": ((2,), "float32")}
        assert opened.state["b"].dtype == ml_dtypes.bfloat16
        assert (opened.entry, opened.args) == ("model_ema1", {"lr": 1, "model": "JiT-B/16"})
    torch.save({"first": state, "second": half}, path)
    for weights, message in (
        (None, "w.pt: choose weights= one of first, second"),
        ("x", "no state dict 'x'; choose weights= one of first, second"),
    ):
        with pytest.raises(UserError, match=message):
            files.read_state_dict(path, weights)
    torch.save({"first": state}, path)
    assert files.open_weights(path).entry == "first"
    torch.save({"model": state, "code": test_folders}, path)
    with pytest.raises(UserError, match="holds a tests.interop.test_files.test_folders, and only"):
        files.read_state_dict(path)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        files.read_state_dict(path)
