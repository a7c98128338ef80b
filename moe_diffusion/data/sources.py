"""Random-access sources of labelled images, opened by name from `config.data.source`.

| name                              | what it is                                  | where        |
|-----------------------------------|---------------------------------------------|--------------|
| `digits`, `synthetic`             | offline, for tests and demonstrations       | here         |
| `folder:<path>`                   | image files, a sub-folder per class         | `images.py`  |
| `tfds:<name>`, `tfds:<path>`      | prepared by TensorFlow Datasets             | `tfds.py`    |
| `latents:<path>`                  | written by `python -m moe_diffusion.prepare`| `latents.py` |

A source has `__len__`, `__getitem__(i) -> {"image": f32[H,W,C] in [-1,1], "label": i32[]}` and
the attributes `num_classes` and `image_shape` (H, W, C). Optional: `take(indices) -> batch` where
a batch can be read at once, `labels` where all labels are known beforehand, `levels`, the number
of grey levels of quantised images (augmentation "dequantize" needs it), and `take_stored` with
`draw` where a training record is drawn at random from a stored one (`latents.Latents`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_diffusion.data.images import ImageFolder
from moe_diffusion.data.latents import MANIFEST, Latents
from moe_diffusion.data.tfds import TfdsImages
from moe_diffusion.errors import UserError

Batch = dict[str, np.ndarray]
SPLITS = ("train", "test")


class Source(Protocol):
    """What the pipeline asks of a source; see the top of this file for what it may add."""

    num_classes: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Digits:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images of 17 grey levels, 10 classes.

    The split is fixed: 1,437 training and 360 held-out images, 80/20 in every class. The images
    ship with scikit-learn, nothing is downloaded.
    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
    """

    num_classes = 10
    image_shape = (8, 8, 1)
    levels = 17

    def __init__(self, split: str):
        # Imported here: takes a second, and only this source needs scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        _check_split(split)
        pixels, labels = load_digits(return_X_y=True)  # pixels 0..16
        indices = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
        )[SPLITS.index(split)]
        images = pixels[indices].reshape(-1, *self.image_shape) / 8 - 1
        self.images = images.astype(np.float32)
        self.labels = labels[indices].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"image": self.images[index], "label": self.labels[index]}

    def take(self, indices: np.ndarray) -> Batch:
        return {"image": self.images[indices], "label": self.labels[indices]}


class Synthetic:
    """Endless supply of images for tests, benchmarks and machines without data; stores nothing.

    Image i is a plane wave. Its class, i mod num_classes, fixes the direction and the colours; the
    phase and the strength are a hash of i. So a model can learn the classes, and every process
    makes the same record i. There are no splits: both names give the same images.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, size: int = 65_536):
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.labels = np.arange(size, dtype=np.int32) % num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> Batch:
        height, width, channels = self.image_shape
        labels = self.labels[indices]
        phase, strength = _hashed_uniform(np.asarray(indices), 2)[..., None, None]
        colours = 1 - 2 * _hashed_uniform(labels, channels + 1)[1:].T[:, None, None, :]
        rows = np.arange(height)[None, :, None] * (labels % 4)[:, None, None] / height
        columns = np.arange(width)[None, None, :] * (labels // 4 % 4)[:, None, None] / width
        # cos(a + b) by the addition theorem: cosines of H + W angles per image, not of H * W.
        a, b = 2 * np.pi * (rows + phase), 2 * np.pi * columns
        wave = (np.cos(a) * np.cos(b) - np.sin(a) * np.sin(b)) * (0.5 + 0.5 * strength)
        images = wave.astype(np.float32)[..., None] * colours.astype(np.float32)
        return {"image": images, "label": labels}


def _hashed_uniform(numbers: np.ndarray, count: int) -> np.ndarray:
    """f64[count, N] uniform in [0, 1), a pure function of each number (SplitMix64's mixer)."""
    streams = np.arange(1, count + 1, dtype=np.uint64)[:, None] << np.uint64(40)
    z = (numbers.astype(np.uint64) + streams) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def open_source(data_config: Any, model_config: Any) -> Source:
    """Opens `data.source` and checks that it fits the model.

    Args:
      data_config: `config.data`; reads `source` (see the top of this file), `split` and
        `skip_broken`.
      model_config: `config.model`; reads `image_size`, `channels` and `num_classes`.

    Raises:
      UserError: the name or split is unknown, the data is not there, or the image shape, the number
        of classes or a label does not fit the model.
    """
    name = data_config.source
    wanted = (model_config.image_size, model_config.image_size, model_config.channels)
    kind, _, place = name.partition(":")
    if kind == "latents" and place and not (Path(place) / MANIFEST).is_file():
        if not Path(place).exists():
            raise UserError(_how_to_prepare(place, wanted))
    source = open_images(
        name,
        wanted,
        split=data_config.split,
        skip_broken=data_config.skip_broken,
        num_classes=model_config.num_classes,
    )
    check_fits(source, name, wanted, model_config.num_classes)
    return source


def open_images(
    name: str,
    image_shape: tuple[int, int, int],
    *,
    split: str = "train",
    skip_broken: bool = False,
    num_classes: int = 10,
) -> Source:
    """Opens a source by name, without a model to fit.

    Args:
      image_shape: [H, W, C] to crop and scale image files to; other sources have their own.
      num_classes: of the source "synthetic".
    """
    kind, _, place = name.partition(":")
    if kind in ("folder", "latents"):
        if split != "train":
            raise UserError(
                f"data.split={split!r} means nothing to {kind}: sources; name the folder of that "
                "split in data.source"
            )
        if place:
            return (
                ImageFolder(place, image_shape, skip_broken)
                if kind == "folder"
                else (Latents(place))
            )
    elif kind == "tfds" and place:
        return TfdsImages(place, split, image_shape)
    elif name == "digits":
        return Digits(split)
    elif name == "synthetic":
        _check_split(split)
        return Synthetic(image_shape, num_classes)
    raise UserError(
        f"data.source={name!r} is unknown; known are: digits, synthetic, folder:<path>, "
        "tfds:<name>, latents:<path>"
    )


def check_fits(
    source: Source, name: str, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Raises a UserError unless the source's images, classes and known labels fit the model's."""
    if tuple(source.image_shape) != image_shape:
        raise UserError(
            f"data.source={name} has images of shape {tuple(source.image_shape)}, the model takes "
            f"{image_shape}: change model.image_size and model.channels, or the source"
        )
    if source.num_classes > num_classes:
        raise UserError(
            f"data.source={name} has {source.num_classes} classes, the model only {num_classes}: "
            f"set model.num_classes={source.num_classes}"
        )
    if hasattr(source, "labels"):
        check_labels(source.labels, np.arange(len(source)), source.num_classes)


def check_labels(labels: np.ndarray, indices: np.ndarray, num_classes: int) -> None:
    """Raises a UserError that names the first record whose label is not in 0..num_classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise UserError(
            f"record {indices[wrong[0]]} of the data has label {labels[wrong[0]]}, outside "
            f"0..{num_classes - 1}: mend the record or the source's number of classes"
        )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"data.split={split!r} is unknown; known are: {', '.join(SPLITS)}")


def _how_to_prepare(folder: str, shape: tuple[int, int, int]) -> str:
    """What a latents folder holds and how it is made; every autoencoder used divides by 8."""
    height, width, channels = shape
    return (
        f"the folder of data.source=latents:{folder} is not there. It must hold labelled {height}x"
        f"{width}x{channels} latents of {8 * height}x{8 * width} images, written by `python -m "
        f"moe_diffusion.prepare --source folder:/data --size {8 * height} --vae sd-vae-ft-ema/ "
        f"--out {folder}`. To train right now without data: --config.data.source=synthetic"
    )
