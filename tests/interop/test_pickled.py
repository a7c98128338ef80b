"""Files of torch.save: what is read without PyTorch, and what is refused without running it."""

from __future__ import annotations

import zipfile

import ml_dtypes
import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.interop import files, pickled
from tests.campaign.mutations import mutations
from tests.interop.torch_file import (
    REBUILD,
    Opcodes,
    build,
    call,
    global_,
    namespace,
    save,
    storage,
)

W = np.arange(6, dtype=np.float32).reshape(2, 3)
FLOATS = global_("torch", "FloatStorage")
STATE = {"w": W, "b": np.ones(1, np.float32)}


def same(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)
        assert found[key].dtype == value.dtype and found.specs[key].shape == value.shape


def test_tensors_of_every_layout(tmp_path):
    state = {
        **STATE,
        "transposed": W.T,
        "half": W.astype(np.float16),
        "bf16": np.arange(3).astype(ml_dtypes.bfloat16),
        "double": W.astype(np.float64),
        "count": np.array(3, np.int64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    save(tmp_path / "w.pt", state)
    same(files.read_state_dict(tmp_path / "w.pt"), state)


def test_views_of_one_storage(tmp_path):
    """Two views, by offset and stride, and one that repeats a number."""
    source = storage(FLOATS, 6)
    views = {
        "column": call(REBUILD, source, 1, (2,), (3,), False, None),
        "rows": call(REBUILD, source, 0, (2, 3), (3, 1), False, None),
        "repeated": call(REBUILD, source, 5, (2, 2), (0, 0), False, None),
    }
    save(tmp_path / "w.pt", views, {"archive/data/0": W.tobytes()})
    wanted = {"column": W[:, 1], "rows": W, "repeated": np.full((2, 2), W[1, 2])}
    same(files.read_state_dict(tmp_path / "w.pt"), wanted)


def test_float8_is_read_as_the_float32_that_holds_it(tmp_path):
    """_rebuild_tensor_v3, whose storage is of bytes."""
    data = np.array([1.5, -2, 0.25], ml_dtypes.float8_e4m3fn)
    source = storage(global_("torch.storage", "UntypedStorage"), 3)
    rebuild = global_("torch._utils", "_rebuild_tensor_v3")
    dtype = global_("torch", "float8_e4m3fn")
    tensor = call(rebuild, source, 0, (3,), (1,), False, None, dtype)
    save(tmp_path / "w.pt", {"w": tensor}, {"archive/data/0": data.tobytes()})
    same(files.read_state_dict(tmp_path / "w.pt"), {"w": data.astype(np.float32)})


def number(value):
    """A numpy scalar as pickle writes it."""
    code = value.dtype.str[1:]
    dtype = build(
        call(global_("numpy", "dtype"), code, False, True), (3, "<", *[None] * 3, -1, -1, 0)
    )
    data = call(global_("_codecs", "encode"), value.tobytes().decode("latin1"), "latin1")
    return call(global_("numpy._core.multiarray", "scalar"), dtype, data)


def test_harmless_values_beside_the_weights(tmp_path):
    """Paths, of another system too, numbers of numpy, dates, counters, sets."""
    args = namespace(
        results_dir=call(global_("pathlib", "PosixPath"), "/", "data", "results"),
        drive=call(global_("pathlib._local", "WindowsPath"), "C:", "x"),
        lr=number(np.float64(3.25)),
        seed=number(np.int64(7)),
        model="SiT-B/2",
        betas=(0.9, 0.95),
        day=call(global_("datetime", "date"), "x"),
    )
    table = build(call(global_("collections", "OrderedDict")), {"_metadata": None})
    everything = {"ema": STATE, "args": args, "best_fid": number(np.float32(0.5)), "more": table}
    everything["set"] = call(global_("__builtin__", "set"), (1, 2))
    everything["counts"] = call(global_("collections", "defaultdict"), global_("builtins", "int"))
    save(tmp_path / "w.pt", everything)
    opened = files.open_weights(tmp_path / "w.pt")
    same(opened.state, STATE)
    plain = {"results_dir": "/data/results", "drive": "C:/x", "lr": 3.25, "seed": 7}
    assert opened.entry == "ema" and opened.args == plain | {"model": "SiT-B/2"}
    assert pickled.load(tmp_path / "w.pt")["best_fid"] == 0.5


def test_a_parameter_is_its_tensor(tmp_path):
    source = storage(FLOATS, 6)
    tensor = call(global_("torch._utils", "_rebuild_tensor_v2"), source, 0, (6,), (1,), False, None)
    parameter = call(global_("torch._utils", "_rebuild_parameter"), tensor, True, None)
    save(tmp_path / "w.pt", {"p": parameter}, {"archive/data/0": W.tobytes()})
    same(files.read_state_dict(tmp_path / "w.pt"), {"p": W.ravel()})


def touch(path):
    return call(global_("os", "system"), f"touch {path}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda ran: {"ema": STATE, "code": touch(ran)},
            "w.pt holds a os.system, and only weights",
        ),
        (lambda ran: {"m": global_("__main__", "Net")}, r"holds a __main__.Net, .*torch.save\("),
        (lambda ran: {"m": global_("builtins", "eval")}, "holds a builtins.eval"),
        (lambda ran: {"m": global_("torch.storage", "_load_from_bytes")}, "_load_from_bytes"),
        (lambda ran: {"m": global_("x" * 5000, "\x1b[31mred")}, "holds a x{80}.*red, and only"),
        (lambda ran: {"m": call(global_("argparse", "Namespace"))}, "choose weights= one of none"),
        (lambda ran: STATE["w"], "holds a Tensor, not a state dict"),
        (lambda ran: (1, 2), "holds a tuple, not a state dict"),
        (
            lambda ran: {"m": build(global_("argparse", "Namespace"), {"a": 1})},
            "cannot have fields",
        ),
        (lambda ran: {("a", "b"): 1}, "a key of a table is no plain value"),
        (lambda ran: Opcodes(b"(S'touch'\nios\nsystem\n"), "damaged"),
        (lambda ran: Opcodes(b"(cos\nsystem\nS'touch'\no"), "os.system|damaged"),
    ],
    ids=range(12),
)
def test_what_is_refused_never_runs(value, message, tmp_path):
    save(tmp_path / "w.pt", value(tmp_path / "ran"))
    with pytest.raises(UserError, match=message):
        files.read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path):
    path = tmp_path / "w.pt"
    save(path, STATE)
    whole = path.read_bytes()
    at = whole.index(W.tobytes())
    path.write_bytes(whole[: at + 5] + b"\x7f" + whole[at + 6 :])
    state = files.read_state_dict(path)
    with pytest.raises(UserError, match="w.pt is damaged in storage 0: fetch it again"):
        state["w"]
    np.testing.assert_array_equal(state["b"], STATE["b"])
    for size, shape, message in (
        (5, (5,), "storage '0' has not the size"),
        (6, (7,), "a tensor reaches beyond its storage"),
        (6, (2**62, 4), "a tensor reaches beyond its storage"),
        (-6, (1,), "storage '0' has not the size"),
    ):
        source = storage(FLOATS, size)
        strides = (1,) * len(shape)
        save(path, {"w": call(REBUILD, source, 0, shape, strides)}, {"archive/data/0": bytes(24)})
        with pytest.raises(UserError, match=message):
            files.read_state_dict(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10**6)
    with pytest.raises(UserError, match="its data.pkl is compressed"):
        files.read_state_dict(path)
    save(path, STATE, {"archive/constants.pkl": b""})
    with pytest.raises(UserError, match="is a TorchScript program: save its state_dict"):
        files.read_state_dict(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="w.pt is damaged, or of a PyTorch before 1.6|damaged or h"):
        files.read_state_dict(path)


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files(count, tmp_path):
    """Every one is refused, or gives the same tensors; arguments may differ."""
    path = tmp_path / "w.pt"
    save(path, {"ema": STATE, "args": namespace(model="SiT-B/2", lr=0.1), "step": 3})
    refused = 0
    for name, data in mutations(path.read_bytes(), "bytes", 0, count):
        path.write_bytes(data)
        try:
            found = files.read_state_dict(path)
            arrays = {key: found[key] for key in found}
        except UserError:
            refused += 1
        else:
            named = {"w": W, "b": STATE["b"]}
            assert sorted(x.tobytes() for x in arrays.values()) == sorted(
                x.tobytes() for x in named.values()
            ), name
    assert refused > 0.5 * count
