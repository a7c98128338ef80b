"""Reads what `torch.save` wrote, without PyTorch and without running any code of the file.

A file of `torch.save` is a zip archive of a pickle and of the bytes of every storage. The pickle
names the functions and classes that its objects are made with. None of them is called: for those
that checkpoints need, functions of this module stand in, and every other name is refused. Tensors
are views of the mapped file, read when they are asked for.

Source of the format: PyTorch 2.x, torch/serialization.py (archive), torch/_utils.py (tensors).
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_diffusion.errors import UserError, explained, shown

_LARGEST = 64 << 20  # bytes of the pickle; that of 5,000 tensors and their optimizer has 2 MB
_REFETCH = "fetch it again"
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_DTYPES = {
    name: jnp.dtype(name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *_FLOAT8,
    )
}
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor of the file.

    Attributes:
      shape, dtype: float8, whose values float32 holds, is read as that.
      read: reads it, as a view of the file. Raises UserError if its bytes are damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Record:
    """Stands for an object of a class without meaning here, such as a `Namespace`: its fields."""

    def __init__(self, *args: Any):
        self.args, self.fields = args, {}


class _Name(NamedTuple):
    """Stands for a class or dtype that is only named, never made: "float32", "list"."""

    name: str


class _Storage(NamedTuple):
    archive: _Archive
    key: str
    dtype: str
    size: int


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file is what `torch.save` writes since PyTorch 1.6."""
    return zipfile.is_zipfile(path)


def load(path: str | os.PathLike) -> Any:
    """What was saved: dicts, lists, plain values, `Tensor`s and `Record`s.

    Raises:
      UserError: the file is damaged, or names a class that is not allowed.
    """
    with explained(f"{path} is damaged or was not written by torch.save", _REFETCH):
        archive = _Archive(path)
        return _Unpickler(archive).load()


class _Archive:
    """The zip archive, mapped."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in self._entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl")
            self._prefix = pickles[0].removesuffix("data.pkl")
            if f"{self._prefix}constants.pkl" in self._entries:
                raise UserError(f"{path} is a TorchScript program: save its state_dict() instead")
            entry = self._entries[pickles[0]]
            if entry.file_size > _LARGEST or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its data.pkl is compressed, or larger than {_LARGEST:,} bytes")
            self.pickle = archive.read(entry)
            order = self._entries.get(f"{self._prefix}byteorder")
            if order and archive.read(order) != b"little":
                raise UserError(f"{path} is of a big-endian machine: convert it there")
        with open(path, "rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._checked: set[str] = set()

    def place(self, key: str) -> tuple[int, int]:
        """(first byte, number of bytes) of a storage in the file."""
        entry = self._entries.get(f"{self._prefix}data/{key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"it holds no plain storage {shown(key)}")
        header = self._mapped[entry.header_offset : entry.header_offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"the place of storage {shown(key)} is wrong")
        begin = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        begin += int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > len(self._mapped):
            raise ValueError("it is cut off")
        return begin, entry.file_size

    def read(self, storage: _Storage) -> np.ndarray:
        """The numbers of a storage. The first time, its checksum is computed."""
        begin, size = self.place(storage.key)
        name = f"{self._prefix}data/{storage.key}"
        if name not in self._checked:
            view = memoryview(self._mapped)[begin : begin + size]
            if zlib.crc32(view) != self._entries[name].CRC:
                raise UserError(f"{self.path} is damaged in storage {storage.key}: {_REFETCH}")
            self._checked.add(name)
        return np.frombuffer(self._mapped, _DTYPES[storage.dtype], storage.size, begin)


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose steps can be restricted one by one."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.pickle), encoding="utf-8")
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "pathlib._local": "pathlib"}.get(module, module)
        module = module.replace("numpy._core", "numpy.core")
        if module == "torch" and name in _DTYPES:
            return _Name(name)
        found = _KNOWN.get(f"{module}.{name}")
        if found is None:
            raise UserError(
                f"{self._archive.path} holds a {module[:80]}.{name[:80]}, and only weights and "
                "plain values are read, because making it could run code: load the file where it "
                "was made, and save the weights alone: torch.save({'ema': ema.state_dict()}, "
                "'weights.pt')"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, _Name) or not isinstance(key, str):
            raise ValueError("a storage is described wrongly")
        width = _DTYPES[dtype.name].itemsize
        if type(size) is not int or size < 0 or self._archive.place(key)[1] != size * width:
            raise ValueError(f"storage {shown(key)} has not the size that it should have")
        return _Storage(self._archive, key, dtype.name, size)

    def _check_keys(self, keys: list[Any]) -> None:
        # The hash of tuples inside each other could take for ever.
        if not all(isinstance(key, str | bytes | int | float | None) for key in keys):
            raise ValueError("a key of a table is no plain value")

    def load_build(self) -> None:
        """Keeps the fields of a `Record`; no method of any object is called."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.fields = state if isinstance(state, dict) else {"state": state}
        elif not isinstance(target, dict):  # a dict's are notes of PyTorch on versions
            raise ValueError(f"a {type(target).__name__} cannot have fields")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if kind is not Record:
            raise ValueError(f"{shown(kind)} is no class")
        self.stack.append(Record(*args))


for _code, _method in (
    (pickle.BUILD, _Unpickler.load_build),
    (pickle.SETITEM, _Unpickler.load_setitem),
    (pickle.SETITEMS, _Unpickler.load_setitems),
    (pickle.DICT, _Unpickler.load_dict),
    (pickle.NEWOBJ, _Unpickler.load_newobj),
):
    _Unpickler.dispatch[_code[0]] = _method
for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.ADDITEMS, pickle.FROZENSET):
    del _Unpickler.dispatch[_code[0]]  # nothing that torch.save writes needs them


# --- what stands for the functions and classes that a file names ---------------------------------


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """_rebuild_tensor, _rebuild_tensor_v2 (rest: whether it needs gradients, hooks, notes)."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("the shape of a tensor is wrong")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    float8 = storage.dtype in _FLOAT8

    def read() -> np.ndarray:
        if not math.prod(size):
            return np.empty(size, dtype)
        flat = storage.archive.read(storage)[offset:]
        steps = [step * flat.itemsize for step in stride]
        view = np.lib.stride_tricks.as_strided(flat, size, steps, writeable=False)
        return view.astype(dtype) if float8 else view

    dtype = np.dtype(np.float32) if float8 else _DTYPES[storage.dtype]
    return Tensor(size, dtype, read)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """_rebuild_tensor_v3 (rest: ..., dtype, ...), whose storage is of bytes."""
    dtype = next((value.name for value in rest if isinstance(value, _Name)), "")
    if dtype not in _DTYPES or not isinstance(storage, _Storage):
        raise ValueError("a tensor has no dtype")
    width = _DTYPES[dtype].itemsize
    total = storage.size * _DTYPES[storage.dtype].itemsize
    return _tensor(storage._replace(dtype=dtype, size=total // width), offset, size, stride)


def _first(value: Any, *rest: Any) -> Any:
    """_rebuild_parameter: the tensor itself."""
    return value


def _from_type(function: Any, kind: Any, args: Any, *rest: Any) -> Any:
    """_rebuild_from_type_v2: what `function` makes, without the class around it."""
    if function not in (_tensor, _tensor_v3, _first):
        raise ValueError("a tensor is made in an unknown way")
    return function(*args)


def _table(pairs: Any = (), *rest: Any) -> dict:
    table = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(key, str | bytes | int | float | None):
            raise ValueError("a key of a table is no plain value")
        table[key] = value
    return table


def _default_table(factory: Any = None, *rest: Any) -> dict:
    return {}


def _list(values: Any = ()) -> list:
    return list(values)


def _path(*parts: Any) -> str:
    """A path as text: nothing on this machine is looked up."""
    return "/".join(str(part)[:1000] for part in parts).replace("//", "/")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("bytes are written in an unknown way")
    return text.encode(encoding)


def _number(kind: Any, data: Any = b"") -> Any:
    """A numpy scalar."""
    code = kind.args[0] if isinstance(kind, Record) and kind.args else ""
    state = kind.fields.get("state", ()) if isinstance(kind, Record) else ()
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    known = ["b1"] + [f"{letter}{size}" for letter in "iuf" for size in (1, 2, 4, 8)]
    if code not in known or not isinstance(data, bytes):
        raise ValueError("a number of numpy is of an unknown kind")
    dtype = np.dtype(f"{order if order in '<>' else '|'}{code}")
    return np.frombuffer(data, dtype, 1)[0].item()


_KNOWN: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _first,
    "torch.device": _path,
    "collections.OrderedDict": _table,
    "collections.defaultdict": _default_table,
    "builtins.dict": _table,
    "builtins.list": _list,
    "builtins.set": _list,
    "argparse.Namespace": Record,
    "types.SimpleNamespace": Record,
    "numpy.core.multiarray.scalar": _number,
    "numpy.core.multiarray._reconstruct": Record,
    "numpy.dtype": Record,
    "_codecs.encode": _encode,
}
_KNOWN |= {f"datetime.{name}": Record for name in ("datetime", "date", "timedelta")}
_KNOWN |= {f"builtins.{name}": _Name(name) for name in ("int", "float", "bool", "str", "tuple")}
_KNOWN |= {f"torch.{name}Storage": _Name(dtype) for name, dtype in _STORAGES.items()}
_KNOWN |= dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), _Name("uint8"))
_KNOWN |= dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), _Name("Tensor"))
_KNOWN |= {"numpy.ndarray": _Name("ndarray")}
_KNOWN |= {
    f"pathlib.{pure}{kind}Path": _path for pure in ("", "Pure") for kind in ("", "Posix", "Windows")
}
