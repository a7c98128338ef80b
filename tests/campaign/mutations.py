"""Damages inputs in every way that people and machines do, the same ways for the same seed."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import yaml

# The file that code in a mutation would make, if it ran.
RAN = os.path.join(tempfile.gettempdir(), "code_of_a_mutation_ran")
# What a value is replaced by. JSON's writer makes NaN and Infinity of floats, as Python's does.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "twelve",
    "digits": "12",
    "empty text": "",
    "long text": "x" * 100_000,
    "path": "../../etc/passwd",
    "list": [1, "a", None],
    "empty list": [],
    "table": {"a": 1},
    "empty table": {},
    "zero": 0,
    "negative": -3,
    "fraction": 0.37,
    "huge": 10**9,
    "2**64": 2**64,
    "10**400": 10**400,
    "1e308": 1e308,
    "-1e308": -1e308,
    "tiny": 1e-320,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "nested": "NESTED",
}


def mutations(given: Any, kind: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields `count` pairs (what was done, the damaged file).

    Args:
      given: of "json" and "yaml" the value; of "npz" a dict of arrays; of "safetensors" and "bytes"
        the whole file.
      kind: "json" | "yaml" | "npz" | "safetensors" | "bytes".
      seed: the same seed gives the same mutations.
    """
    rng = random.Random(f"{kind} {seed}")
    for _ in range(count):
        yield _KINDS[kind](given, rng)


def whole(given: Any, kind: str) -> bytes:
    """The file before anything happens to it."""
    if kind == "npz":
        return _zipped({key: _npy(value) for key, value in given.items()})
    if kind in ("json", "yaml"):
        return (json.dumps if kind == "json" else yaml.safe_dump)(given).encode()
    return given


def _json(value: Any, rng: random.Random) -> tuple[str, bytes]:
    return _text(value, rng, json.dumps)


def _yaml(value: Any, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.1:
        name, text = rng.choice(_YAML_TRICKS)
        return name, whole(value, "yaml") + text.encode()
    return _text(value, rng, yaml.safe_dump)


# Appended to the text of a table.
_YAML_TRICKS = (
    ("refers to itself", "depth: &a [*a]\n"),
    ("its own key", "zz: &a {b: *a}\n"),
    ("merges itself", "zz: &a {<<: *a}\n"),
    (
        "references that explode",
        "a0: &a0 [0]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    ),
    (
        "merges that explode",
        "m0: &m0 {k: 0}\n"
        + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 60)),
    ),
    ("an object of Python", f"zz: !!python/object/apply:os.system ['touch {RAN}']\n"),
    ("bytes", "zz: !!binary aGVsbG8=\n"),
    ("a set", "zz: !!set {a, b}\n"),
    ("a number as key", "1: 2\n"),
    ("a list as key", "? [1, 2]\n: 3\n"),
    ("deep", "zz: " + "[" * 5000 + "]" * 5000 + "\n"),
    ("deep without end", "zz: " + "{a: " * 5000 + "\n"),
    ("a tab", "\tzz: 1\n"),
    ("two documents", "---\na: 1\n"),
    ("a long number", "zz: " + "9" * 5000 + "\n"),
    ("no anchor", "zz: *nowhere\n"),
)


def _text(value: Any, rng: random.Random, dump: Callable[[Any], str]) -> tuple[str, bytes]:
    """Changes one value, or the text."""
    if rng.random() < 0.25:
        name, data = _bytes(dump(value).encode(), rng)
        return name, data
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    holder, key, path = rng.choice(places)
    what = rng.choice(("drop", "rename", "twice", *["replace"] * 9))
    if what == "drop":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif what == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        what = rng.choice(list(VALUES))
        holder[key] = copy.deepcopy(VALUES[what])
    text = dump(changed)
    if what == "nested":
        depth = rng.choice((40, 500, 100_000))
        text = text.replace('"NESTED"', "NESTED").replace("NESTED", "[" * depth + "]" * depth)
    return f"{what} {path}", text.encode()


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, path) of every value inside of a value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key, f"{path}.{key}"
            yield from _places(value[key], f"{path}.{key}")


def _bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cuts, flips, removes, repeats or inserts bytes."""
    what = rng.choice(("cut", "flip", "flips", "insert", "remove", "repeat", "zero", "empty"))
    at = rng.randrange(max(1, len(data)))
    length = rng.choice((1, 3, 64))
    changed = bytearray(data)
    if what == "cut":
        changed = changed[:at]
    elif what in ("flip", "flips"):
        for _ in range(1 if what == "flip" else 8):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "insert":
        changed[at:at] = rng.randbytes(length)
    elif what == "remove":
        del changed[at : at + length]
    elif what == "repeat":
        changed[at:at] = changed[at : at + length]
    elif what == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    else:
        changed = bytearray()
    return f"{what} at {at}", bytes(changed)


def _safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Changes the header, its length, or bytes."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.3:
        name, changed = _bytes(data[: 8 + length], rng)
        return name, changed + rest
    if choice < 0.4:
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return f"length {wrong}", wrong.to_bytes(8, "little") + header + rest
    name, text = _text(json.loads(header), rng, json.dumps)
    return name, len(text).to_bytes(8, "little") + text + rest


def _npz(arrays: Mapping[str, np.ndarray], rng: random.Random) -> tuple[str, bytes]:
    """Changes an array, the header of one, or bytes of the archive."""
    if rng.random() < 0.35:
        return _bytes(whole(arrays, "npz"), rng)
    changed = {key: np.array(value) for key, value in arrays.items()}
    key = rng.choice(list(changed))
    what = rng.choice((*_ARRAYS, "drop", "rename", "header", "twice", "bomb"))
    data = {}
    if what == "drop":
        del changed[key]
    elif what == "rename":
        changed["other"] = changed.pop(key)
    elif what in _ARRAYS:
        changed[key] = _ARRAYS[what](changed[key])
    data = {name: _npy(value) for name, value in changed.items()}
    if what == "header":
        name, data[key] = _bytes(data[key][:128], rng)
        data[key] += _npy(changed[key])[128:]
        what = f"header, {name}"
    elif what == "bomb":
        shape = (2**40, *changed[key].shape[1:])
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"shape": shape, "fortran_order": False, "descr": "<f4"}
        )
        data[key] = stream.getvalue() + bytes(10**6)
    return f"{what} {key}", _zipped(data, compress=rng.random() < 0.3)


_ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "object": lambda x: np.full(x.shape, None, object),
    "text": lambda x: x.astype(str),
    "complex": lambda x: x.astype(complex),
    "bool": lambda x: x.astype(bool),
    "int64": lambda x: np.zeros(x.shape, np.int64),
    "NaN": lambda x: np.full(x.shape, np.nan),
    "infinity": lambda x: np.full(x.shape, np.inf),
    "1e300": lambda x: np.full(x.shape, 1e300),
    "negative": lambda x: -np.abs(x.astype(np.float64)) - 1,
    "none of it": lambda x: x.reshape(-1)[:0].reshape(0, *x.shape[1:]),
    "flat": lambda x: x.reshape(-1),
    "one axis more": lambda x: x[None],
    "scalar": lambda x: np.array(3),
    "transposed": lambda x: np.asfortranarray(x[::-1] if x.ndim else x),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "record": lambda x: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]),
    "skew": lambda x: x + np.triu(np.ones(x.shape[-2:])) if x.ndim > 1 else x + np.float32(9),
}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _zipped(data: Mapping[str, bytes], compress: bool = False) -> bytes:
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in data.items():
            with archive.open(f"{name}.npy", "w") as member:  # `writestr` would note the time
                member.write(content)
    return stream.getvalue()


_KINDS = {
    "json": _json,
    "yaml": _yaml,
    "npz": _npz,
    "safetensors": _safetensors,
    "bytes": _bytes,
}
