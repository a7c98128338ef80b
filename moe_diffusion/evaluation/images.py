"""Sets of images to judge: an `.npz`, a folder of pictures, or a data source.

Each set has `name`, `shape` (H, W, C), `len()` and `batches(size, num)`. The latter yields the
first `num` images as u8[b, H, W, C], or as f32[b, H, W, C] in [-1, 1]. Opening a file checks what
its header says.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from moe_diffusion.data import sources
from moe_diffusion.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_LARGEST = 8.0  # samples overshoot [-1, 1] a little; larger values show that the range is another


class Images(Protocol):
    name: str
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]: ...


class ArchiveImages:
    """`arr_0` [N, H, W, C] of an `.npz`, read piece by piece: u8, or floats in [-1, 1]."""

    def __init__(self, path: str | os.PathLike, key: str = "arr_0"):
        self.name, self._path, self._member = str(path), Path(path), f"{key}.npy"
        with zipfile.ZipFile(path) as archive, archive.open(self._member) as file:
            shape, in_order, self._dtype = _read_header(file)
        if in_order:
            raise UserError(f"{key} of {path} is in Fortran order: save it as a C-ordered array")
        self._count, self.shape = shape[0], tuple(shape[1:])
        if self._dtype != np.uint8 and self._dtype.kind != "f":
            raise UserError(
                f"{key} of {path} is {self._dtype}: images are uint8, or floats in [-1, 1]"
            )
        check_shape(self.shape, self.name)
        for batch in self.batches(64, min(64, self._count)):
            check_range(batch, self.name)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as file:
            _read_header(file)
            for start in range(0, num, size):
                shape = (min(size, num - start), *self.shape)
                length = int(np.prod(shape)) * self._dtype.itemsize
                data = file.read(length)
                if len(data) != length:
                    raise UserError(f"{self._path} is cut off: make it again")
                batch = np.frombuffer(data, self._dtype).reshape(shape)
                yield batch if batch.dtype == np.uint8 else batch.astype(np.float32)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    return read(file)


class FolderImages:
    """All pictures directly in a folder, ordered by name.

    If the first picture is grey, all are read with one channel, otherwise with three.
    """

    def __init__(self, folder: str | os.PathLike):
        self.name = str(folder)
        self._paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in PICTURES)
        if not self._paths:
            raise UserError(
                f"{folder} holds no pictures ({', '.join(PICTURES)}); for one folder per class "
                f"write folder:{folder}"
            )
        self._mode = ""
        for path in self._paths:
            with _opened(path) as picture:
                self._mode = self._mode or ("L" if picture.mode == "L" else "RGB")
                shape = (picture.height, picture.width, len(self._mode))
            if path == self._paths[0]:
                self.shape = shape
            elif shape != self.shape:
                raise UserError(
                    f"{path} is {shape[1]}x{shape[0]}, {self._paths[0].name} is "
                    f"{self.shape[1]}x{self.shape[0]}: all pictures must have one size"
                )

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        for start in range(0, num, size):
            paths = self._paths[start : min(start + size, num)]
            yield np.stack([self._read(path) for path in paths])

    def _read(self, path: Path) -> np.ndarray:
        with _opened(path) as picture:
            try:
                pixels = np.asarray(picture.convert(self._mode))
            except OSError as error:
                raise UserError(f"{path} is a broken picture ({error}): delete it") from None
        return pixels.reshape(self.shape)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is a broken picture ({error}): delete or replace it") from None


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
    path = Path(text)
    if path.suffix == ".npz":
        return ArchiveImages(path)
    if path.is_dir():
        return FolderImages(path)
    name, _, split = text.partition("@")
    if name.partition(":")[0] not in ("digits", "synthetic", "folder", "tfds"):
        raise UserError(
            f"{text} is not there: give an .npz, a folder of pictures, or a data source "
            "(folder:<path>, tfds:<name>, digits), with @test for its other split"
        )
    if not size and name != "digits":
        raise UserError(f"{text} needs --size: the side in pixels to which its images are cropped")
    source = sources.open_images(name, (*(size or (0, 0)), 3), split=split or "train")
    return SourceImages(source, text)


def check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 3 or shape[-1] not in (1, 3) or min(shape) < 1:
        raise UserError(
            f"{name} holds arrays of shape {list(shape)}, not images [H, W, 1 or 3]; latents must "
            "be decoded first"
        )


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
