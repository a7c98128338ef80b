"""Files appear under their names only when they are whole, and replace only what they may."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moe_diffusion import remote
from moe_diffusion.errors import UserError, check_writable

# Suffix -> how such a file begins.
_BEGINNINGS = {".png": b"\x89PNG\r\n", ".gif": b"GIF8", ".npz": b"PK", ".json": b"{"}
_BEGINNINGS |= {".html": b"<!doctype html>"}
_LONGEST = 60  # characters of a temporary name that are those of the file


class WriteError(UserError, OSError):
    """A file could not be written; what was there before is still there."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a new file in the folder of `path`, which is made; the end of the body renames it.

    The temporary name is random, so it is nobody else's. If the body fails, the file is removed
    and what was at `path` stays. A link at `path` is replaced, not followed. The path may be
    remote, like gs://bucket/name.

    Raises:
      WriteError: the disk is full, the folder is not writable, or `path` is no regular file.
    """
    if url := remote.url_of(path):
        try:
            with remote.whole_object(url, mode) as file:
                yield file
        except OSError as error:
            raise error if isinstance(error, UserError) else _not_written(url, error) from error
        return
    path, name = Path(path), None
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is there and is no regular file")  # renaming would replace /dev/null
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(".part", f".{path.name[:_LONGEST]}.", path.parent)
        with os.fdopen(number, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp lets nobody else read
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        ours = (None, name, os.fspath(path), os.fspath(path.parent))  # else: what the body reads
        if isinstance(error, UserError) or getattr(error, "filename", "") not in ours:
            raise
        raise _not_written(path, error) from error


def _not_written(path: str | os.PathLike, error: OSError) -> WriteError:
    return WriteError(
        f"cannot write {path} ({error.strerror or error}): make room, or choose another folder"
    )


def save_text(text: str, path: str | os.PathLike) -> Path:
    """Writes a text file, which may be remote, whole or not at all; returns its path."""
    with whole_file(path, "w") as file:
        file.write(text)
    return Path(path)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, Any]) -> Path:
    """Writes an uncompressed `.npz`, whole or not at all; returns its path."""
    import numpy as np  # a tenth of a second, which `--help` need not wait for

    with whole_file(path) as file:
        np.savez(file, **arrays)
    return Path(path)


def append_line(text: str, path: str | os.PathLike) -> None:
    """Adds a line to a text file, which may be remote, whole or not at all.

    A last line that has no end, as a killed process leaves it, is ended first.

    Raises:
      WriteError: the file cannot be written; it holds what it held.
    """
    if remote.url_of(path):
        with remote.open_log(path) as log:
            log.write(text + "\n")
        return
    try:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
            start = b"\n" if size and file.read(1) != b"\n" else b""
            data = start + text.encode() + b"\n"
            try:
                if file.write(data) < len(data):
                    raise OSError("No space left on device")
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise _not_written(path, error) from error


def check_outputs(
    outputs: Mapping[str, tuple[str | os.PathLike | None, str]],
    inputs: Iterable[str | os.PathLike | None] = (),
) -> None:
    """Checks the files that a command will write, before it works for hours.

    Args:
      outputs: flag -> (path, suffix of its kind: .png, .gif, .npz, .json or .html);
        flags without a path
        are passed over.
      inputs: files that the command reads, and folders that it reads whole.

    Raises:
      UserError: a path is remote, a folder, has another suffix, cannot be written, holds a file of
        another kind, or is that of another output or of an input.
    """
    read = {os.path.realpath(path): path for path in inputs if path and os.path.exists(path)}
    taken: dict[str, str] = {}
    for flag, (path, suffix) in outputs.items():
        if not path:
            continue
        if "://" in os.fspath(path):
            raise UserError(f"{flag} {path} is remote: write into a local folder and copy it there")
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: name a file in it")
        if Path(path).suffix.lower() != suffix:
            raise UserError(f"{flag} {path} will be a {suffix} file: name it so")
        check_writable(Path(path).parent)
        real = os.path.realpath(path)
        for place in (real, *map(str, Path(real).parents)):
            if place in read:
                where = "is" if place == real else "lies in"
                raise UserError(f"{flag} {path} {where} {read[place]}, which is read: rename it")
        if real in taken:
            raise UserError(f"{taken[real]} and {flag} are the same file {path}: rename one")
        taken[real] = flag
        _check_kind(flag, Path(path), suffix)


def _check_kind(flag: str, path: Path, suffix: str) -> None:
    """Raises a UserError if something else than a file of this kind lies at the path."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{flag} {path} is there and is no regular file: choose another name")
    with path.open("rb") as file:
        begin = file.read(16).lstrip() if suffix == ".json" else file.read(16)
    if begin and not begin.startswith(_BEGINNINGS[suffix]):
        raise UserError(f"{flag} {path} is there and is no {suffix} file: choose another name")


def check_empty(flag: str, folder: str | os.PathLike) -> None:
    """Raises a UserError unless a folder for new files is absent or holds none but hidden ones."""
    if "://" in os.fspath(folder):
        raise UserError(f"{flag} {folder} is remote: write into a local folder and copy it there")
    check_writable(folder)
    if os.path.isdir(folder) and any(not n.startswith(".") for n in os.listdir(folder)):
        raise UserError(
            f"{flag} {folder} is not empty, and its files would be taken for new ones: choose "
            "another folder, or empty this one"
        )


def save_each(*saves: Callable[[], Any]) -> None:
    """Calls every function, even if an earlier one fails; then raises the UserErrors as one."""
    failed = []
    for save in saves:
        try:
            save()
        except UserError as error:
            failed.append(error)
    if failed:
        raise UserError("; ".join(map(str, failed)))
