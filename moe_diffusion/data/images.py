"""Image files: ADM's centre crop, and a source that reads one sub-folder per class."""

from __future__ import annotations

import os
import sys

import numpy as np
from PIL import Image

from moe_diffusion import pictures
from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError

_NEIGHBOURS = 100  # a source that skips broken images gives up after this many in a row
_REMEDY = (
    "restore or delete it, or skip such files with data.skip_broken=true (prepare: --skip-broken)"
)


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
    """The centre crop of a grey or RGB image as f32[H, W, C] in [-1, 1], grey if C = 1."""
    height, width, channels = shape
    mode = "RGB" if channels == 3 else "L"
    pixels = np.asarray(center_crop(image.convert(mode), height, width))
    return pixels.reshape(shape).astype(np.float32) / 127.5 - 1


class ImageFolder:
    """`<folder>/<class>/**/<file>`: classes are the sorted names of the sub-folders.

    The labels are those of torchvision's ImageFolder, except that hidden folders and those of the
    system are no classes and every file counts once (`pictures.by_folder`). Every process lists the
    folder at the start and reads an image when it needs it. A file that is no image raises a
    UserError that names it. With `skip_broken` it is a line on stderr instead, and the next good
    image takes its place.
    """

    def __init__(self, folder: str, image_shape: tuple[int, int, int], skip_broken: bool = False):
        if image_shape[2] not in (1, 3):
            raise UserError(
                f"images of folder:{folder} are grey or in colour: they cannot be {image_shape}. "
                "For latents: data.source=latents:<folder>"
            )
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {folder}: data.source=folder:<path> names one")
        files = pictures.by_folder(folder)
        self.class_names = sorted(files)
        if not files:
            raise UserError(
                f"{folder} holds no sub-folder: images must lie in one sub-folder per class, like "
                f"{folder}/n01440764/1.jpg"
            )
        if empty := [name for name in self.class_names if not files[name]]:
            raise UserError(
                f"{os.path.join(folder, empty[0])} holds no image "
                f"({', '.join(pictures.SUFFIXES)}): fill or delete it"
            )
        self._files = [file for name in self.class_names for file in files[name]]
        counts = [len(files[name]) for name in self.class_names]
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        self.cond_spec = {"label": Field((), "int32", len(files))}
        self.image_shape, self.skip_broken = image_shape, skip_broken
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        for neighbour in range(index, index + _NEIGHBOURS):
            record = self.read(neighbour % len(self))
            if record is not None:
                return record
        raise UserError(
            f"{_NEIGHBOURS} images in a row from {self.name(index)} on are broken: restore them"
        )

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        """Record `index`, or None if its image is broken and may be skipped."""
        try:
            image = pictures.read(self.name(index), self.name(index), _REMEDY)
        except UserError as error:
            if not self.skip_broken:
                raise
            if index not in self._reported:
                self._reported.add(index)
                print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None
        return {"image": to_array(image, self.image_shape), "label": self.labels[index]}

    def picture_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the picture of record `index`; None if `read` may skip it."""
        return pictures.size_of(self.name(index), self.name(index), _REMEDY, self.skip_broken)

    def name(self, index: int) -> str:
        """The file of record `index`."""
        return self._files[index]
