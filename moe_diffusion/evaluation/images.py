"""Sets of images to judge: an `.npz`, a folder of pictures, or a data source.

Each set has `name`, `shape` (H, W, C), `len()` and `batches(size, num)`. The latter yields the
first `num` images as u8[b, H, W, C], or as f32[b, H, W, C] in [-1, 1]. Opening a file checks what
its header says.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from moe_diffusion import pictures
from moe_diffusion.data import sources
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.archives import open_archive

_REMEDY = "delete or replace it"
_PIXELS = Image.MAX_IMAGE_PIXELS  # of an image; pictures of more are taken for an attack
_AT_ONCE = 1 << 26  # numbers that are read to look at the range
_LARGEST = 8.0  # samples overshoot [-1, 1] a little; larger values show that the range is another


class Images(Protocol):
    name: str
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]: ...


class ArchiveImages:
    """`arr_0` [N, H, W, C] of an `.npz`, read piece by piece: u8, or floats in [-1, 1]."""

    def __init__(self, path: str | os.PathLike, key: str = "arr_0"):
        self.name, self._path, self._key = str(path), Path(path), key
        with open_archive(path) as archive:
            if key not in archive.headers:
                raise UserError(f"{path} holds no {key}: name an .npz of images")
            shape, in_order, self._dtype = archive.headers[key]
        if in_order:
            raise UserError(f"{key} of {path} is in Fortran order: save it as a C-ordered array")
        if self._dtype != np.uint8 and self._dtype.kind != "f":
            raise UserError(
                f"{key} of {path} is {self._dtype}: images are uint8, or floats in [-1, 1]"
            )
        check_shape(tuple(shape[1:]), self.name)
        self._count, self.shape = shape[0], tuple(shape[1:])
        if not self._count:
            raise UserError(f"{path} holds no image: make it again")
        size = max(1, min(64, _AT_ONCE // math.prod(self.shape)))
        for batch in self.batches(size, min(size, self._count)):
            check_range(batch, self.name)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        with open_archive(self._path) as archive, archive.stream(self._key) as file:
            for start in range(0, num, size):
                shape = (min(size, num - start), *self.shape)
                length = math.prod(shape) * self._dtype.itemsize
                data = file.read(length)
                if len(data) != length:
                    raise UserError(f"{self._path} is cut off: make it again")
                batch = np.frombuffer(data, self._dtype).reshape(shape)
                yield batch if batch.dtype == np.uint8 else batch.astype(np.float32)


class FolderImages:
    """All pictures directly in a folder, ordered by name; grey only if every one of them is."""

    def __init__(self, folder: str | os.PathLike):
        self.name = str(folder)
        self._paths = pictures.directly_in(folder)
        if not self._paths:
            raise UserError(
                f"{folder} holds no pictures ({', '.join(pictures.SUFFIXES)}); for one folder per "
                f"class write folder:{folder}"
            )
        headers = [pictures.header(path, _REMEDY) for path in self._paths]
        height, width, _ = headers[0]
        self.shape = (height, width, max(channels for *_, channels in headers))
        for path, header in zip(self._paths, headers, strict=True):
            self._check_size(path, header)

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        for start in range(0, num, size):
            paths = self._paths[start : min(start + size, num)]
            yield np.stack([self._read(path) for path in paths])

    def _read(self, path: str) -> np.ndarray:
        picture = pictures.read(path, path, _REMEDY)
        self._check_size(path, (picture.height, picture.width))
        return np.asarray(picture.convert("L" if self.shape[-1] == 1 else "RGB")).reshape(
            self.shape
        )

    def _check_size(self, path: str, size: Sequence[int]) -> None:
        """Raises a UserError unless a picture is of the height and width of the first."""
        if tuple(size[:2]) != self.shape[:2]:
            raise UserError(
                f"{path} is {size[1]}x{size[0]}, {Path(self._paths[0]).name} is "
                f"{self.shape[1]}x{self.shape[0]}: all pictures must have one size"
            )


class SourceImages:
    """The first images of a data source (see `data.sources`), without augmentation."""

    def __init__(self, source: Any, name: str):
        self.name, self._source = name, source
        self.shape = tuple(source.image_shape)

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        for start in range(0, num, size):
            indices = range(start, min(start + size, num))
            yield np.stack([self._source[i]["image"] for i in indices])


def open_images(text: str, size: tuple[int, int] | None = None) -> Images:
    """The images that `text` names: `x.npz`, a folder of pictures, or a data source.

    Args:
      size: (height, width) in pixels, to which a source such as "folder:/data" crops its images.

    Raises:
      UserError: `text` names nothing that exists, or it cannot be read, or its kind is unknown.
    """
    name, split = split_of(text)
    if not is_source(text):
        if text.endswith(".npz"):
            return ArchiveImages(text)
        if Path(text).is_dir():
            return FolderImages(text)
        raise UserError(
            f"{text} is not there: give an .npz, a folder of pictures, or a data source "
            "(folder:<path>, tfds:<name>, digits), with @test for another split of the latter two"
        )
    if Path(text).is_dir():
        print(f"{text} is a data source; the folder of that name is ./{text}", file=sys.stderr)
    if not size and name != "digits":
        raise UserError(f"{text} needs --size: the side in pixels to which its images are cropped")
    source = sources.open_images(name, (*(size or (0, 0)), 3), split=split or "train")
    return SourceImages(source, text)


def is_source(text: str) -> bool:
    """Whether a text names a data source, rather than a file or a folder of pictures."""
    return split_of(text)[0] in ("digits", "synthetic") or text.startswith(("folder:", "tfds:"))


def split_of(text: str) -> tuple[str, str]:
    """ "digits@test" -> ("digits", "test"): the name of a data source, and its split or "".

    Sources without splits, and datasets of tfds that are named by an existing folder, may have an @
    in their names.
    """
    name, _, split = text.rpartition("@")
    kind, _, place = text.partition(":")
    if kind.partition("@")[0] not in ("digits", "synthetic", "tfds") or not name:
        return text, ""
    return (text, "") if place and Path(place).exists() or "/" in split else (name, split)


def check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 3 or shape[-1] not in (1, 3) or min(shape) < 1:
        raise UserError(
            f"{name} holds arrays of shape {list(shape)}, not images [H, W, 1 or 3]; latents must "
            "be decoded first"
        )
    if shape[0] * shape[1] > _PIXELS:
        raise UserError(f"{name} holds images of {shape[0]}x{shape[1]} pixels, beyond {_PIXELS:,}")


def check_range(batch: np.ndarray, name: str) -> None:
    """Raises a UserError unless floats are finite and roughly in [-1, 1]."""
    if batch.dtype == np.uint8:
        return
    if not np.isfinite(batch).all():
        raise UserError(f"{name} holds NaN or infinity: make the images again")
    if np.abs(batch).max(initial=0) > _LARGEST:
        raise UserError(
            f"{name} holds floats up to {np.abs(batch).max():.4g}: floats must be in [-1, 1]; for "
            "0..255 save uint8"
        )


def to_pixels(batch: np.ndarray, quantize: str) -> np.ndarray:
    """Turns a batch of a set into f32[b, H, W, C] in [0, 255].

    Args:
      quantize: "round" gives whole numbers, as a PNG holds them. "none" gives 127.5 x + 128,
        clipped, which the sampling scripts of DiffMoE and DSMoE feed to the network.
    """
    if batch.dtype == np.uint8:
        return batch.astype(np.float32)
    if quantize == "none":
        return np.clip(127.5 * batch + 128, 0, 255)
    return np.rint((np.clip(batch, -1, 1) + 1) * 127.5)


def to_floats(batch: np.ndarray) -> np.ndarray:
    """Turns a batch of a set into f32[b, H, W, C] in [-1, 1], clipped."""
    if batch.dtype == np.uint8:
        return batch.astype(np.float32) / 127.5 - 1
    return np.clip(batch, -1, 1)
