"""Files appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe_diffusion import remote


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a new file in the folder of `path`, which is made; the end of the body renames it.

    If the body fails, the file is removed and what was at `path` stays. The path may be remote.
    """
    if url := remote.url_of(path):
        with remote.whole_object(url, mode) as file:
            yield file
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    try:
        with os.fdopen(number, mode) as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp lets nobody else read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_text(text: str, path: str | os.PathLike) -> Path:
    """Writes a text file, whole or not at all; returns its path."""
    with whole_file(path, "w") as file:
        file.write(text)
    return Path(path)
