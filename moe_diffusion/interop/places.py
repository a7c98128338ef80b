"""Where weight files lie: one file, the shards of one, or a folder of several networks."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moe_diffusion.errors import UserError
from moe_diffusion.interop.tensors import listed
from moe_diffusion.reading import Key, check_keys, plain_name, read_table, regular_file

_OLD = ".bin"  # transformers' older files; in a folder they count only where no others are
PICKLED = (".pt", ".pth", ".ckpt", _OLD)  # .ckpt: PyTorch Lightning
SUFFIXES = (".safetensors", *PICKLED)
INDEX = ".safetensors.index.json"
_NO_INDEX = "it is no index of shards; fetch it again"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def find(path: str | os.PathLike, subfolder: str = "") -> Path:
    """The weight file of a path, which may be the file or its folder.

    Args:
      subfolder: is used if the folder has it, for example "transformer" of a diffusers pipeline.

    Returns:
      A weight file, or a folder: of one file in shards, or with subfolders of weight files.

    Raises:
      UserError: there is no weight file, or there are several.
    """
    path = Path(path)
    if subfolder and (path / subfolder).is_dir():
        path = path / subfolder
    if path.is_dir():
        inside = _weight_files(path)
        if shard_set(path) or (not inside and subfolders(path)):
            return path
        if len(inside) == 1:
            return Path(regular_file(inside[0], "weight file"))
        names = listed([p.name for p in inside]) or "none"
        raise UserError(f"{path} should hold one weight file; it holds {names}: name a file")
    regular_file(path, "weight file")
    if path.suffix not in SUFFIXES and not path.name.endswith(INDEX):
        raise UserError(f"{path.name}: weight files end in {', '.join((*SUFFIXES, INDEX))}")
    return path


def _weight_files(folder: Path) -> list[Path]:
    """The indices of shards in a folder; if it has none, its weight files."""
    if indices := sorted(folder.glob(f"*{INDEX}")):
        return indices
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    return [p for p in found if p.suffix != _OLD] or found


def subfolders(folder: Path) -> list[Path]:
    """The subfolders that hold `.safetensors`, as in a diffusers pipeline."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in inner if any(p.suffix == SUFFIXES[0] for p in path.iterdir())]


def shard_set(folder: Path) -> list[Path]:
    """The files of a folder, if all of them are shards, and there is no index of them."""
    files = _weight_files(folder)
    return files if files and all(_SHARD.fullmatch(path.name) for path in files) else []


def shards(path: Path) -> list[Path]:
    """The files of one state dict: of an index, of a folder of shards, or the file itself.

    Raises:
      UserError: the index is none, or a shard is not there.
    """
    found = shard_set(path if path.is_dir() else path.parent)
    if path.name.endswith(INDEX):
        index = read_table(path, _NO_INDEX)
        check_keys(index, {"weight_map": Key((dict,))}, str(path), _NO_INDEX)
        for key, name in index["weight_map"].items():
            Key((str,)).check(name, f"{path}: weight_map.{key}", _NO_INDEX)
        names = sorted({plain_name(n, f"{path}: weight_map") for n in index["weight_map"].values()})
        folder = path.parent
    elif path.is_dir() or path in found:
        one = path if path in found else found[0]
        stem, total = _SHARD.fullmatch(one.name).group(1, 3)
        folder = one.parent
        names = [f"{stem}-{n:05}-of-{total}.safetensors" for n in range(1, int(total) + 1)]
        if path.is_dir() and not {shard.name for shard in found} <= set(names):
            raise UserError(f"{path} holds the shards of several files: name one of them")
    else:
        return [path]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise UserError(f"{path} names shards that are not beside it: {listed(absent) or 'none'}")
    return [folder / name for name in names]
