"""Reading and writing PyTorch's weight files, one tensor at a time.

`.safetensors` needs no PyTorch. `.pt` and `.pth` are read with `torch.load(weights_only=True)`,
which runs no code of the file. `argparse.Namespace` is the only foreign class that it accepts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from moe_diffusion.errors import UserError, first_line
from moe_diffusion.interop.tensors import Lazy, Spec, joined, of_torch

SUFFIXES = (".safetensors", ".pt", ".pth")
INDEX = ".safetensors.index.json"
# Name of a dtype in safetensors -> numpy's dtype.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "BOOL": "?"}
DTYPES |= {f"{sign}{8 * size}": f"<{sign.lower()}{size}" for sign in "IU" for size in (1, 2, 4, 8)}
# Names of state dicts in the authors' checkpoints. Of several averages, the authors evaluate the
# one that comes first here.
AVERAGES = ("ema", "ema_model_state_dict", "model_ema1", "model_ema", "ema_state_dict")
LIVE = ("model", "model_state_dict", "state_dict", "module")


class Weights(NamedTuple):
    """What lies in a weight file.

    Attributes:
      state: tensor name -> numpy array.
      entry: name of this state dict, if the file holds several; None if the file is just one.
      args: arguments of the training script, if the file holds them under "args".
    """

    state: Lazy
    entry: str | None = None
    args: dict[str, Any] | None = None


def of_safetensors(*paths: str | os.PathLike) -> Lazy:
    """Maps one `.safetensors` file, or the shards of one state dict; the tensors are views.

    A tensor's pages are given back when its last view is gone.
    """
    specs, places = {}, {}
    for path in paths:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # opening checks the header, and that the file is as long as it says
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                known = ", ".join(DTYPES)
                raise UserError(f"{path}: {key} is {entry['dtype']}; readable are {known}")
            specs[key] = Spec(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]]))
            places[key] = mapped, start + entry["data_offsets"][0]

    def read(key: str) -> np.ndarray:
        (shape, dtype), (mapped, begin) = specs[key], places[key]
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        aligned, end = begin - begin % mmap.PAGESIZE, begin + count * dtype.itemsize
        # The disk starts to read now, not when the first byte is used.
        mapped.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)
        tensor = np.frombuffer(mapped, dtype, count, begin)
        # Views of the tensor hold on to its base. When it goes, the pages are given back.
        weakref.finalize(tensor.base, mapped.madvise, mmap.MADV_DONTNEED, aligned, end - aligned)
        return tensor.reshape(shape)

    return Lazy(specs, read)


def read_state_dict(path: str | os.PathLike, weights: str | None = None) -> Lazy:
    """Tensor name -> numpy array of a weight file; see `open_weights`."""
    return open_weights(path, weights).state


def open_weights(path: str | os.PathLike, weights: str | None = None) -> Weights:
    """Opens a weight file, or a folder of several.

    Args:
      path: a file, the `.safetensors.index.json` of a sharded one, or a folder; see `find`. If only
        its subfolders hold weights, as in a pipeline of diffusers, the tensors of all of them are
        in one state dict under names like "transformer/proj_out.weight".
      weights: for `.pt`/`.pth` files that hold several state dicts, the entry to take. "ema" also
        stands for the first average and "model" for the live weights, whatever they are called.
        None takes the first average, or else the live weights.

    Raises:
      UserError: there is no such file or entry, the suffix is unknown, or the file is not readable
        or unsafe.
    """
    path = find(path)
    if path.is_dir():
        parts = {f"{folder.name}/": open_weights(folder, weights) for folder in _subfolders(path)}
        return Weights(joined({prefix: opened.state for prefix, opened in parts.items()}))
    if path.suffix not in (".pt", ".pth"):
        if weights is not None:
            raise UserError(f"{path.name} holds one state dict; leave out weights={weights!r}")
        paths = _shards(path) if path.name.endswith(INDEX) else [path]
        try:
            return Weights(of_safetensors(*paths))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    return _pick(path, _torch_load(path), weights)


def find(path: str | os.PathLike, subfolder: str = "") -> Path:
    """The weight file of a path, which may be the file or its folder.

    Args:
      subfolder: is used if the folder has it, for example "transformer" of a diffusers pipeline.

    Returns:
      A weight file, or a folder whose subfolders hold weight files.

    Raises:
      UserError: there is no weight file, or there are several.
    """
    path = Path(path)
    if subfolder and (path / subfolder).is_dir():
        path = path / subfolder
    if path.is_dir():
        inside = _weight_files(path)
        if len(inside) == 1:
            return inside[0]
        if not inside and _subfolders(path):
            return path
        names = ", ".join(p.name for p in inside) or "none"
        raise UserError(f"{path} should hold one weight file; it holds {names}: name a file")
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    if path.suffix not in SUFFIXES and not path.name.endswith(INDEX):
        raise UserError(f"{path.name}: weight files end in {', '.join((*SUFFIXES, INDEX))}")
    return path


def _weight_files(folder: Path) -> list[Path]:
    """The indices of shards in a folder; if it has none, its weight files."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    return indices or sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)


def _subfolders(folder: Path) -> list[Path]:
    """The subfolders that hold `.safetensors`, as in a diffusers pipeline."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in inner if any(p.suffix == SUFFIXES[0] for p in path.iterdir())]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards: it lacks a table 'weight_map'") from None
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index} names shards that are not beside it: {', '.join(absent)}")
    return [index.parent / name for name in names]


def _torch_load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path.name} needs PyTorch: pip install 'moe_diffusion[torch]', "
            "or convert the file to .safetensors"
        ) from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            mmap = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, EOF
        raise UserError(
            f"{path} is damaged or holds more than weights: {first_line(error)}"
        ) from None


def _pick(path: Path, loaded: Any, weights: str | None) -> Weights:
    """Picks the state dict that `weights` stands for; see `open_weights`."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path.name} holds a {type(loaded).__name__}, not a state dict")
    if _is_state_dict(loaded) and weights is None:
        return Weights(of_torch(loaded))
    nested = [k for k, v in loaded.items() if isinstance(v, Mapping) and _is_state_dict(v)]
    if weights in nested or (weights is None and len(nested) == 1):
        chosen = weights or nested[0]
    else:
        wanted = {None: AVERAGES + LIVE, "ema": AVERAGES, "model": LIVE}.get(weights, ())
        chosen = next((name for name in wanted if name in nested), None)
    if chosen is None:
        asked = "" if weights is None else f"no state dict '{weights}'; "
        raise UserError(f"{path.name}: {asked}choose weights= one of {', '.join(nested) or 'none'}")
    args = loaded.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return Weights(
        of_torch(loaded[chosen]), chosen, dict(args) if isinstance(args, Mapping) else None
    )


def _is_state_dict(mapping: Mapping) -> bool:
    return bool(mapping) and all(hasattr(v, "detach") for v in mapping.values())


def write_state_dict(state: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes a `.safetensors` file; a file at `path` is replaced only by a complete one."""
    state = {key: np.asarray(tensor) for key, tensor in state.items()}
    with safetensors_writer(path, {k: Spec(v.shape, v.dtype) for k, v in state.items()}) as write:
        for key, tensor in state.items():
            write(key, tensor)


@contextlib.contextmanager
def safetensors_writer(path: str | os.PathLike, specs: Mapping[str, Spec]) -> Iterator[Any]:
    """Writes a `.safetensors` file part by part; a file at `path` is replaced only by a whole one.

    It yields write(key, array, axis=0, start=0): `array` is the part of tensor `key` that begins at
    `start` of `axis`. Parts come in any order. Together they must cover every tensor.

    Args:
      specs: name -> shape and dtype of all tensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name}: weights are written as .safetensors")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (shape, dtype) in specs.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {
            "dtype": _name(dtype), "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            data = file.tell()
            file.truncate(data + end)

            def write(key: str, array: np.ndarray, axis: int = 0, start: int = 0) -> None:
                shape, dtype = specs[key]
                stop = start + (array.shape[axis] if shape else 1)
                part = (*shape[:axis], stop - start, *shape[axis + 1 :]) if shape else ()
                if array.shape != part or (shape and stop > shape[axis]):
                    raise ValueError(f"{key} is {shape}: no room for {array.shape} at {start}")
                if not array.size:
                    return
                # The part is one run of bytes for every index of the axes before `axis`.
                runs = np.ascontiguousarray(array, dtype).reshape(math.prod(shape[:axis]), -1)
                size = math.prod(shape[axis:]) * runs.itemsize
                skipped = start * math.prod(shape[axis + 1 :]) * runs.itemsize
                for number, run in enumerate(runs):
                    file.seek(data + header[key]["data_offsets"][0] + number * size + skipped)
                    run.tofile(file)

            yield write
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _name(dtype: np.dtype) -> str:
    """The name that safetensors gives to a dtype: F32, BF16, I64, BOOL."""
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return "BF16"
    if dtype.kind not in "fiub":
        raise ValueError(f"dtype {dtype} cannot be stored in a .safetensors file")
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
