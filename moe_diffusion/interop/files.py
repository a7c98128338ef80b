"""Reading and writing PyTorch's weight files, one tensor at a time.

Nothing here needs PyTorch, except files from before PyTorch 1.6, which were no zip archives. `.pt`,
`.pth`, `.ckpt` and `.bin` are read by `pickled`, older ones with `torch.load(weights_only=True)`.
Both run no code of the file and refuse classes other than those that hold plain values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from moe_diffusion.errors import UserError, explained
from moe_diffusion.interop import pickled
from moe_diffusion.interop.downloads import check_download
from moe_diffusion.interop.places import PICKLED, find, shard_set, shards, subfolders
from moe_diffusion.interop.tensors import Lazy, Spec, joined, listed, of_torch
from moe_diffusion.writing import whole_file

# Name of a dtype in safetensors -> numpy's dtype.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "BOOL": "?"}
DTYPES |= {f"{sign}{8 * size}": f"<{sign.lower()}{size}" for sign in "IU" for size in (1, 2, 4, 8)}
# Names of state dicts in the authors' checkpoints. Of several averages, the authors evaluate the
# one that comes first here.
AVERAGES = ("ema", "ema_model_state_dict", "model_ema1", "model_ema", "ema_state_dict")
LIVE = ("model", "model_state_dict", "state_dict", "module")
# Names of an average begin so where one state dict holds it beside the live weights.
AVERAGED = "ema_model."
HPARAMS = "hyperparameters"  # in the header of a .safetensors file: a table, as JSON


class Weights(NamedTuple):
    """What lies in a weight file.

    Attributes:
      state: tensor name -> numpy array.
      entry: name of this state dict, if the file holds several; None if the file is just one.
      args: arguments of the training script, if the file holds them under "args".
      hparams: hyperparameters as JSON, if a `.safetensors` file has them in its header.
    """

    state: Lazy
    entry: str | None = None
    args: dict[str, Any] | None = None
    hparams: str | None = None


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
            if key in specs:
                raise UserError(f"{path}: {key} is in another shard, too: fetch the shards again")
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
    if path.is_dir() and not shard_set(path):
        parts = {f"{folder.name}/": open_weights(folder, weights) for folder in subfolders(path)}
        return Weights(joined({prefix: opened.state for prefix, opened in parts.items()}))
    paths = [path] if path.suffix in PICKLED else shards(path)
    for file in paths:
        check_download(file)
    if path.suffix in PICKLED:
        opened = _pick(path, _unpickled(path), weights)
    else:
        with explained(f"{path} is damaged or no safetensors file", "fetch it again"):
            opened = Weights(of_safetensors(*paths), hparams=_hparams(paths))
    return _split(path, opened, weights)


def _hparams(paths: Sequence[Path]) -> str | None:
    """The hyperparameters in the header of a `.safetensors` file, or of one of its shards."""
    for path in paths:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(HPARAMS)
        if text is not None:
            return text
    return None


def _unpickled(path: Path) -> Any:
    if pickled.is_archive(path):
        return pickled.load(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path.name} is damaged, or of a PyTorch before 1.6, which needs PyTorch to be read: "
            "pip install 'moe_diffusion[torch]', or save it again with a newer one"
        ) from None
    with (
        explained(f"{path} is damaged or holds more than weights", "save the weights alone"),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        return torch.load(path, map_location="cpu", weights_only=True)


def _pick(path: Path, loaded: Any, weights: str | None) -> Weights:
    """Picks the state dict that `weights` stands for; see `open_weights`."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path.name} holds a {type(loaded).__name__}, not a state dict")
    if _is_state_dict(loaded):
        return Weights(_lazy(loaded))
    nested = [k for k, v in loaded.items() if isinstance(v, Mapping) and _is_state_dict(v)]
    if weights in nested or (weights is None and len(nested) == 1):
        chosen = weights or nested[0]
    else:
        wanted = {None: AVERAGES + LIVE, "ema": AVERAGES, "model": LIVE}.get(weights, ())
        chosen = next((name for name in wanted if name in nested), None)
        if chosen is None and weights == "ema":  # under a prefix, beside the live weights
            chosen = next((name for name in nested if _averaged(loaded[name])), None)
    if chosen is None:
        asked = "" if weights is None else f"no state dict '{weights}'; "
        names = listed([str(name) for name in nested]) or "none"
        raise UserError(f"{path.name}: {asked}choose weights= one of {names}")
    return Weights(_lazy(loaded[chosen]), str(chosen), _args(loaded))


def _split(path: Path, opened: Weights, weights: str | None) -> Weights:
    """Takes the average or the live weights of a state dict that holds both under prefixes.

    Raises:
      UserError: `weights` asks for something that is not there.
    """
    averaged = set(_averaged(opened.state))
    # The rest may be bookkeeping of the average: its step, whether it has begun.
    live = [k for k, spec in opened.state.specs.items() if k not in averaged and len(spec.shape)]
    if not averaged or not live:
        if weights is not None and opened.entry is None:
            raise UserError(f"{path.name} holds one state dict; leave out weights={weights!r}")
        return opened
    if opened.entry is None and weights not in (None, "ema", "model"):
        raise UserError(f"{path.name}: no state dict '{weights}'; choose weights= ema or model")
    entry, keys = ("model", live) if weights == "model" else (AVERAGED[:-1], averaged)
    specs = {key: opened.state.specs[key] for key in keys}
    return opened._replace(state=Lazy(specs, opened.state.__getitem__), entry=entry)


def _averaged(state: Mapping[str, Any]) -> list[str]:
    return [key for key in state if isinstance(key, str) and key.startswith(AVERAGED)]


def _args(loaded: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plain values of the training script's arguments, if the file holds them under "args"."""
    args = loaded.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    elif isinstance(args, pickled.Record):
        args = args.fields
    if not isinstance(args, Mapping):
        return None
    plain = (str, int, float, type(None))
    return {k: v for k, v in args.items() if isinstance(k, str) and isinstance(v, plain)}


def _is_state_dict(mapping: Mapping) -> bool:
    tensors = (isinstance(v, pickled.Tensor) or hasattr(v, "detach") for v in mapping.values())
    return bool(mapping) and all(tensors) and all(isinstance(key, str) for key in mapping)


def _lazy(state: Mapping[str, Any]) -> Lazy:
    if not isinstance(next(iter(state.values())), pickled.Tensor):
        return of_torch(state)
    specs = {key: Spec(tensor.shape, tensor.dtype) for key, tensor in state.items()}
    return Lazy(specs, lambda key: state[key].read())


def write_state_dict(
    state: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    hparams: Mapping[str, Any] | None = None,
) -> None:
    """Writes a `.safetensors` file; a file at `path` is replaced only by a complete one.

    hparams: goes into its header.
    """
    state = {key: np.asarray(tensor) for key, tensor in state.items()}
    specs = {key: Spec(tensor.shape, tensor.dtype) for key, tensor in state.items()}
    with safetensors_writer(path, specs, hparams) as write:
        for key, tensor in state.items():
            write(key, tensor)


@contextlib.contextmanager
def safetensors_writer(
    path: str | os.PathLike, specs: Mapping[str, Spec], hparams: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Writes a `.safetensors` file part by part; a file at `path` is replaced only by a whole one.

    It yields write(key, array, axis=0, start=0): `array` is the part of tensor `key` that begins at
    `start` of `axis`. Parts come in any order. Together they must cover every tensor.

    Args:
      specs: name -> shape and dtype of all tensors.
      hparams: hyperparameters for the header, see `Weights`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name}: weights are written as .safetensors")
    told = {} if hparams is None else {HPARAMS: json.dumps(hparams)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **told}}
    end = 0
    for key, (shape, dtype) in specs.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {
            "dtype": _name(dtype), "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
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


def _name(dtype: np.dtype) -> str:
    """The name that safetensors gives to a dtype: F32, BF16, I64, BOOL."""
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return "BF16"
    if dtype.kind not in "fiub":
        raise ValueError(f"dtype {dtype} cannot be stored in a .safetensors file")
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
