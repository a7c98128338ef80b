"""Reading and writing PyTorch's weight files.

`.safetensors` needs no PyTorch. `.pt` and `.pth` are read with `torch.load(weights_only=True)`,
which runs no code of the file; of foreign classes only `argparse.Namespace` may occur in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from moe_diffusion.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth")


class SafetensorsFile(Mapping):
    """A `.safetensors` file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, path: str | os.PathLike):
        self._file = safetensors.safe_open(path, framework="numpy")
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_state_dict(path: str | os.PathLike, weights: str | None = None) -> Mapping[str, Any]:
    """Tensor name -> numpy array of a weight file.

    Args:
      weights: for `.pt`/`.pth` files that hold several state dicts, the entry to take ("ema",
        "model", ...); None: the file is itself a state dict, or has only one.

    Raises:
      UserError: no such file, unknown suffix, not readable, unsafe, or no such entry.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path.name}: weight files end in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        if weights is not None:
            raise UserError(f"{path.name} holds one state dict; leave out weights={weights!r}")
        try:
            return SafetensorsFile(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    return _pick(path, _torch_load(path), weights)


def write_state_dict(state: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes a `.safetensors` file; a file at `path` is replaced only by a complete one."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name}: weights are written as .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(dict(state), partial)
    os.replace(partial, path)


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
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, EOF
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is damaged or holds more than weights: {reason}") from None


def _pick(path: Path, loaded: Any, weights: str | None) -> dict[str, np.ndarray]:
    """The one state dict that is meant, its tensors as numpy arrays."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path.name} holds a {type(loaded).__name__}, not a state dict")
    nested = [k for k, v in loaded.items() if isinstance(v, Mapping) and _is_state_dict(v)]
    if weights is None and not _is_state_dict(loaded):
        if len(nested) != 1:
            raise UserError(f"{path.name}: choose weights= one of {', '.join(nested) or 'none'}")
        weights = nested[0]
    if weights is not None:
        if weights not in nested:
            raise UserError(
                f"{path.name} has no state dict '{weights}'; it has {', '.join(nested) or 'none'}"
            )
        loaded = loaded[weights]
    return {key: _to_numpy(tensor) for key, tensor in loaded.items()}


def _is_state_dict(mapping: Mapping) -> bool:
    return bool(mapping) and all(hasattr(v, "detach") for v in mapping.values())


def _to_numpy(tensor: Any) -> np.ndarray:
    # numpy has no bfloat16; float32 holds every value of it.
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
