"""Folders that are not on this machine, like gs://bucket/run, and files in them.

An object store shows whole objects only, and cannot add to one. etils.epath reads and writes there
through fsspec; what is here are the two kinds of writing that it lacks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import time
from collections.abc import Iterator
from typing import IO, Any

from moe_diffusion.errors import UserError

# Scheme -> the packages that read and write there: files, and TensorBoard's events. Checkpoints
# need none (tensorstore).
DRIVERS = {"gs": ("gcsfs",), "s3": ("s3fs", "boto3")}
_EVERY = 60.0  # seconds between two writings of a log


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path, or what stands behind the name of a kind ("latents:gs://b"), is a URL."""
    return re.match(r"(\w+:)?[\w.+-]+://", os.fspath(path)) is not None


def url_of(path: str | os.PathLike) -> str | None:
    """The URL of a remote file, also where pathlib has made one slash of two; None if it is local.

    A local path of that look would be a folder named "gs:", which nobody means.
    """
    known = re.match(rf"({'|'.join(DRIVERS)}):/+", os.fspath(path))
    return known and f"{known[1]}://{os.fspath(path)[known.end() :]}"


def check(path: str | os.PathLike, what: str) -> None:
    """Checks that a remote folder can be reached at all; a local path passes.

    Args:
      what: the flag or key that names it, for the message.

    Raises:
      UserError: nothing here reads such a folder, or the package that would is not installed.
    """
    scheme, url, _ = os.fspath(path).partition("://")
    if not url:
        return
    if scheme not in DRIVERS:
        known = " and ".join(f"{name}://" for name in DRIVERS)
        raise UserError(f"{what} {path}: {scheme}:// is not supported; {known} are")
    missing = [name for name in DRIVERS[scheme] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} {path} needs a driver: pip install {' '.join(missing)}")


@contextlib.contextmanager
def whole_object(url: str, mode: str = "wb") -> Iterator[IO]:
    """Collects what the body writes; the object appears, or is replaced, at the end of the body."""
    file = io.BytesIO() if "b" in mode else io.StringIO()
    yield file
    with _object(url).open(mode) as target:
        target.write(file.getvalue())


def _object(url: str) -> Any:
    from etils import epath  # a third of a second, which `--help` need not wait for

    return epath.Path(url)


def open_log(path: str | os.PathLike) -> IO | RemoteLog:
    """Opens a text file to add lines to, in a folder that may be remote."""
    url = url_of(path)
    return RemoteLog(url) if url else open(path, "a")


class RemoteLog:
    """A remote text file that grows: the whole is written anew, at most every minute and at last.

    gcsfs would overwrite what is there when it is asked to append.
    """

    def __init__(self, url: str):
        self.name, path = url, _object(url)
        self._text = path.read_text() if path.exists() else ""
        self._written, self._when = len(self._text), time.monotonic()

    def __enter__(self) -> RemoteLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        """Writes the file if the last time is a while ago."""
        if time.monotonic() - self._when >= _EVERY:
            self.close()

    def close(self) -> None:
        """Writes the file if it has grown. More can be added afterwards."""
        if len(self._text) > self._written:
            with whole_object(self.name, "w") as file:
                file.write(self._text)
            self._written = len(self._text)
        self._when = time.monotonic()
