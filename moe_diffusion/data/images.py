"""Image files: ADM's centre crop, and a source that reads one sub-folder per class."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_NEIGHBOURS = 100  # a source that skips broken images gives up after this many in a row


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales an image until it just covers height x width pixels, and crops its centre.

    A box filter halves the image while it is twice too large in both directions, then a bicubic
    filter scales it. ADM prepared ImageNet like this (Dhariwal and Nichol, 2105.05233,
    `guided_diffusion/image_datasets.py`), and FIDs compare only between equal preparations.
    """
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    shape = round(image.width * scale), round(image.height * scale)
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """The centre crop as f32[H, W, C] in [-1, 1], in grey (C = 1) or RGB (C = 3)."""
    height, width, channels = shape
    mode = "RGB" if channels == 3 else "L"
    pixels = np.asarray(center_crop(image.convert(mode), height, width))
    return pixels.reshape(shape).astype(np.float32) / 127.5 - 1


class ImageFolder:
    """`<folder>/<class>/**/<file>`: classes are the sorted names of the sub-folders.

    The labels are those of torchvision's ImageFolder. Every process lists the folder at the start
    and reads an image when it needs it. A file that is no image raises a UserError that names it.
    With `skip_broken` it is a line on stderr instead, and the next good image takes its place.
    """

    def __init__(self, folder: str, image_shape: tuple[int, int, int], skip_broken: bool = False):
        if image_shape[2] not in (1, 3):
            raise UserError(
                f"images of folder:{folder} are grey or in colour: they cannot be {image_shape}. "
                "For latents: data.source=latents:<folder>"
            )
        self.image_shape = image_shape
        self.skip_broken = skip_broken
        self.class_names, self._files, labels = _list(Path(folder))
        self.cond_spec = {"label": Field((), "int32", len(self.class_names))}
        self.labels = np.array(labels, np.int32)
        self._folder = folder
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        for neighbour in range(index, index + _NEIGHBOURS):
            record = self.read(neighbour % len(self))
            if record is not None:
                return record
        raise UserError(
            f"{_NEIGHBOURS} images in a row from {self.name(index)} on are broken: is "
            f"{self._folder} whole?"
        )

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        """Record `index`, or None if its image is broken and may be skipped."""
        try:
            with Image.open(self.name(index)) as image:
                pixels = to_array(image, self.image_shape)
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, ...
            what = f"{self.name(index)} cannot be read as an image ({error})"
            if not self.skip_broken:
                raise UserError(
                    f"{what}: restore or delete it, or skip such files with "
                    "data.skip_broken=true (prepare: --skip-broken)"
                ) from None
            if index not in self._reported:
                self._reported.add(index)
                print(f"skipped: {what}", file=sys.stderr, flush=True)
            return None
        return {"image": pixels, "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file of record `index`."""
        return os.path.join(self._folder, self.class_names[self.labels[index]], self._files[index])


def _list(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Lists a folder of one sub-folder per class.

    Returns:
      The sorted names of the classes; the files, each relative to the folder of its class; the
      label of each file.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: data.source=folder:<path> names one")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        found = _files(folder / name)
        if not found:
            raise UserError(
                f"{folder / name} holds no image ({', '.join(SUFFIXES)}): fill or delete it"
            )
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"{folder} holds no sub-folder: images must lie in one sub-folder per class, like "
            f"{folder / 'n01440764'}/1.jpg"
        )
    return classes, files, labels


def _files(folder: Path) -> list[str]:
    """Sorted paths, relative to `folder`, of the images in it and in its sub-folders."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        images = (name for name in names if name.lower().endswith(SUFFIXES))
        found += [os.path.relpath(os.path.join(place, name), folder) for name in images]
    return sorted(found)
