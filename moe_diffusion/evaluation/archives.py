"""Opens an `.npz` that a user hands over: what it says of an array, before any of it is read."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_diffusion import digests
from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.reading import regular_file

_BOMB = 1 << 30  # bytes; what is larger and shrank more than _RATIO times is no array of ours
_RATIO = 100
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """What an array says of itself."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


class Archive:
    """An open `.npz`. Nothing in it is unpickled.

    Attributes:
      headers: name of an array -> `Header`.
    """

    def __init__(self, path: str | os.PathLike, file: zipfile.ZipFile):
        self.path, self._file = str(path), file
        self.headers: dict[str, Header] = {}
        for entry in file.infolist():
            name = entry.filename.removesuffix(".npy")
            with file.open(entry) as stream:
                self.headers[name] = header = read_header(stream)
                begin = stream.tell()
            size = math.prod(header.shape) * header.dtype.itemsize
            if header.dtype.hasobject:
                raise UserError(
                    f"{name} of {path} is of Python objects, which could run code: save numbers"
                )
            if min(header.shape, default=0) < 0 or size != entry.file_size - begin:
                raise ValueError(f"{shown(name)} is not as long as it says")
            if size > _BOMB and size > _RATIO * entry.compress_size:
                raise UserError(
                    f"{name} of {path} unpacks to {size:,} bytes from {entry.compress_size:,}: it "
                    "is no set of images or features"
                )

    def stream(self, name: str) -> Any:
        """The bytes of an array, after its header; use it in a `with`."""
        stream = self._file.open(f"{name}.npy")
        read_header(stream)
        return stream

    def numbers(self, name: str, dtype: type) -> np.ndarray:
        """An array of real numbers, cast to `dtype`.

        Raises:
          UserError: it holds something else, or a number that is not finite or too large for
            features.
        """
        header = self.headers[name]
        if header.dtype.kind not in "iuf":
            raise UserError(f"{name} of {self.path} is {shown(header.dtype)}: numbers are wanted")
        with self._file.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        # Without a copy; NaN passes through both.
        largest = max(float(array.max()), -float(array.min())) if array.size else 0.0
        if not largest <= 1e15:
            what = "NaN or infinity" if not np.isfinite(largest) else f"numbers up to {largest:.3g}"
            raise UserError(f"{name} of {self.path} holds {what}: make the file again")
        return array.astype(dtype)


def read_header(stream: Any) -> Header:
    """Reads the header of an array. Raises ValueError for one that is damaged or unknown."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"its arrays are of version {version}")
    return Header(*_HEADERS[version](stream))


@contextlib.contextmanager
def open_archive(path: str | os.PathLike) -> Iterator[Archive]:
    """Opens an `.npz`; an error of the body is taken for damage, unless it is a UserError.

    Raises:
      UserError: there is no such file, or it is damaged, no `.npz`, or holds Python objects.
    """
    regular_file(path, ".npz")
    with explained(f"{path} is damaged or no .npz", "fetch or make it again"):
        with zipfile.ZipFile(path) as file:
            archive = Archive(path, file)
            digests.check_zip(path, unread=("arr_0.npy",))  # images are read piece by piece
            yield archive
