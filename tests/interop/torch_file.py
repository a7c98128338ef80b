"""Writes what `torch.save` writes, opcode by opcode, so that no test needs PyTorch.

The layout is that of torch 2.x (torch/serialization.py): a zip of stored entries, in them a pickle
of protocol 2 whose storages are persistent ids, and one entry `data/<key>` for each storage.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage"}
STORAGES |= {"bfloat16": "BFloat16Storage", "int64": "LongStorage", "bool": "BoolStorage"}


class Opcodes(bytes):
    """Opcodes that push one object."""


def global_(module: str, name: str) -> Opcodes:
    return Opcodes(f"c{module}\n{name}\n".encode())


def call(function: Opcodes, *args: Any, storages: dict[str, bytes] | None = None) -> Opcodes:
    """Opcodes of function(*args)."""
    pushed = b"".join(_push(arg, {} if storages is None else storages) for arg in args)
    return Opcodes(function + b"(" + pushed + b"tR")


def build(thing: Opcodes, state: Any) -> Opcodes:
    """Opcodes that set the state of an object."""
    return Opcodes(thing + _push(state, {}) + b"b")


def namespace(**fields: Any) -> Opcodes:
    return build(Opcodes(global_("argparse", "Namespace") + b")\x81"), fields)


def storage(kind: Opcodes, size: int, key: str = "0") -> Opcodes:
    """Opcodes of the storage `data/<key>` of `size` numbers."""
    return Opcodes(_push(("storage", kind, key, "cpu", size), {}) + b"Q")


REBUILD = global_("torch._utils", "_rebuild_tensor_v2")


def _push(value: Any, storages: dict[str, bytes]) -> bytes:
    if isinstance(value, Opcodes):
        return value
    if isinstance(value, dict):
        items = b"".join(_push(k, storages) + _push(v, storages) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(_push(item, storages) for item in value) + b"t"
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, np.ndarray):
        return _tensor(value, storages)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return pickle.dumps(value, 2)[2:-1]
    return b"G" + struct.pack(">d", value)


def _tensor(array: np.ndarray, storages: dict[str, bytes]) -> bytes:
    """A tensor with a storage of its own, in the order in which it lies in memory."""
    key = str(len(storages))
    storages[key] = array.tobytes("A")
    strides = tuple(step // array.itemsize for step in array.strides)
    source = storage(global_("torch", STORAGES[array.dtype.name]), array.size, key)
    hooks = call(global_("collections", "OrderedDict"))
    return call(REBUILD, source, 0, array.shape, strides, False, hooks)


def save(path: Path, value: Any, extra: dict[str, bytes] | None = None) -> None:
    """Writes a file of torch.save.

    Args:
      value: nested dicts and tuples of plain values, arrays (as tensors) and `Opcodes`.
      extra: further entries of the archive.
    """
    storages: dict[str, bytes] = {}
    program = b"\x80\x02" + _push(value, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in {"archive/version": b"3\n", **(extra or {})}.items():
            archive.writestr(name, data)
