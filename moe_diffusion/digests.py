"""Digests of files, so that what is read is what was written, or the damaged file is named.

`write` notes the SHA-256 of every file of a folder in `digests.json`, and `check` compares. A JSON
object that holds digests, or numbers that nothing else checks, carries a digest of itself (`seal`).
SHA-256 takes 0.6 s a GB on a core with instructions for it; several files are read at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from moe_diffusion.errors import UserError

NAME = "digests.json"
SMALL = 1 << 20  # bytes; so little is read at once, where the rest can wait
_TIMES = "_CHECKPOINT_METADATA"  # orbax writes when it was done, later; nothing is read from it
_PART = "digests.{}.part"  # of one of several processes, until `write` collects them
_THREADS = 4
_END = struct.Struct("<4s6xH10x")  # the last record of a zip without comment: number of members
_log = logging.getLogger(__name__)


class Damaged(UserError):
    """A file is not what was written. `file` is its path inside of the folder that was checked."""

    def __init__(self, file: str):
        super().__init__(f"{file} is damaged: its content is not what was written")
        self.file = file


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the entry "digest", the SHA-256 of a JSON object without that entry."""
    return values | {"digest": _digest_of(values)}


def is_sealed(values: dict[str, Any]) -> bool:
    """Whether a JSON object has the digest that `seal` gave it."""
    return values.get("digest") == _digest_of(values)


def _digest_of(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(folder: epath.Path) -> None:
    """Writes `digests.json` of all files below a folder; one process alone calls this.

    Files that `write_part` has noted are not read again.
    """
    found: dict[str, str] = {}
    parts = list(folder.glob(_PART.format("*")))
    for part in parts:
        found |= json.loads(part.read_text())
        part.unlink()
    names = [name for name in _names(folder) if name not in found]
    found |= zip(names, _map(lambda name: file_digest(folder / name), names), strict=True)
    whole = folder / f".{NAME}.part"
    whole.write_text(json.dumps(seal({"files": found}), indent=1, sort_keys=True) + "\n")
    whole.replace(folder / NAME)


def write_part(folder: epath.Path, own: str) -> None:
    """Notes the digests of the files below folder/own, which this process has written."""
    names = [f"{own}/{name}" for name in _names(folder / own)] if (folder / own).exists() else []
    found = zip(names, _map(lambda name: file_digest(folder / name), names), strict=True)
    (folder / _PART.format(jax.process_index())).write_text(json.dumps(dict(found)))


def check(*folders: epath.Path, largest: int | None = None) -> None:
    """Compares the files of folders with what `write` noted; all processes call this.

    A folder without `digests.json` is of an earlier version and is not checked, which is told.
    Several processes share the work.

    Args:
      largest: leaves files of more bytes out; None takes all.

    Raises:
      Damaged: on every process, if a file is missing or another one. It names the first.
    """
    noted = [folder for folder in folders if (folder / NAME).is_file()]
    files = [(folder, *entry) for folder in noted for entry in _read(folder).items()]
    others = [os.fspath(folder) for folder in folders if folder not in noted and folder.exists()]
    if others and largest is None and jax.process_index() == 0:
        _log.warning("%s: without %s, so not checked for damage", ", ".join(others), NAME)
    wrong = None
    own = range(jax.process_index(), len(files), jax.process_count())
    for number, good in zip(own, _map(lambda i: _is_whole(*files[i], largest), own), strict=True):
        wrong = number if wrong is None and not good else wrong
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.int32(-1 if wrong is None else wrong))
        wrong = min((int(number) for number in found if number >= 0), default=None)
    if wrong is not None:
        folder, name, _ = files[wrong]
        raise Damaged(f"{folder.name}/{name}")


def check_zip(path: str | os.PathLike, unread: Collection[str] = ()) -> None:
    """Reads the members of a zip (an `.npz`) once, to compare their checksums.

    Who reads an array reads as many bytes as its header says. With a damaged header that is not all
    of them, and then no checksum is compared. A damaged length in the directory hides the entries
    behind it, which the record at the end of the file counts.

    Args:
      unread: members to leave out.

    Raises:
      zipfile.BadZipFile, zlib.error, OSError, EOFError or RuntimeError: the file is damaged.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        file.seek(-_END.size, os.SEEK_END)
        signature, count = _END.unpack(file.read(_END.size))
        if signature == b"PK\5\6" and count != len(entries):
            raise zipfile.BadZipFile(f"{len(entries)} of its {count} members are found")
        for entry in entries:
            if entry.filename not in unread:
                with archive.open(entry) as content:
                    while content.read(1 << 24):
                        pass


def _read(folder: epath.Path) -> dict[str, str]:
    try:
        noted = json.loads((folder / NAME).read_text())
        if is_sealed(noted):
            return noted["files"]
    except (ValueError, AttributeError, RecursionError):  # it is no JSON, or no object
        pass
    raise Damaged(f"{folder.name}/{NAME}")


def _is_whole(folder: epath.Path, name: str, digest: str, largest: int | None) -> bool:
    path = folder / name
    try:
        if largest is not None and path.stat().length > largest:
            return True
        return path.is_file() and file_digest(path) == digest
    except OSError:  # it is gone, or the disk cannot read it
        return False


def _names(folder: epath.Path, below: str = "") -> list[str]:
    """The files below a folder, in order, as paths inside of it."""
    found = []
    for path in sorted(folder.iterdir()):
        name = below + path.name
        found += _names(path, name + "/") if path.is_dir() else [name]
    return [name for name in found if name not in (NAME, _TIMES)]


def _map(function: Callable[[Any], Any], values: Sequence[Any] | Collection[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, values))
