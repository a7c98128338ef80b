"""Random-access sources of images with conditions, opened by name from `config.data.source`.

| name                              | what it is                                  | where        |
|-----------------------------------|---------------------------------------------|--------------|
| `digits`                          | offline, for demonstrations                 | here         |
| `digits_prompts`, `digit_pairs`   | the same images with prompts                | one floor up |
| `synthetic`                       | made up, for tests                          | one floor up |
| `folder:<path>`                   | image files, a sub-folder per class         | `images.py`  |
| `tfds:<name>`, `tfds:<path>`      | prepared by TensorFlow Datasets             | `tfds.py`    |
| `latents:<path>`                  | written by `python -m moe_diffusion.prepare`| `latents.py` |
| `<package.module>:<name>`         | a class, function or object of your own     | your module  |

A source has `__len__` and `__getitem__(i) -> {"image": f32[H, W, C] in [-1, 1], **cond}`. The
attribute `image_shape` is (H, W, C); `cond_spec` names the fields of cond (see `conditions`). For
example, `Digits.cond_spec` is {"label": Field((), "int32", 10)}. A source may also have

* `take(indices) -> batch`, if it can read a batch at once;
* `labels`, i32[N], if it knows all labels beforehand: they are then checked before training;
* `levels`, the number of grey levels of quantised images; the augmentation "dequantize" needs it;
* `take_stored` and `draw`, if it draws a training record from a stored one (`latents.Latents`),
  and `stored_spec` and `draw_captions`, if the stored ones have several captions;
* `buckets`, if its images are of several shapes, see the top of buckets.py. `image_shape` is one of
  these shapes;
* `picture_size(i)`, the (height, width) of the picture from which record i is made, for `prepare
  --sizes`, which sets `image_shape` in a copy of the source. None means that it is broken.

A class or a function of your own is called with those of `image_shape`, `cond_spec` (of the model)
and `split` that it has parameters for. The worker processes of `data.num_workers` receive the
source as a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_diffusion.buckets import buckets_of
from moe_diffusion.conditions import Field, check_fields, fields_of
from moe_diffusion.data.images import ImageFolder
from moe_diffusion.data.latents import Latents
from moe_diffusion.data.tfds import TfdsImages
from moe_diffusion.digit_pairs import DigitPairs
from moe_diffusion.digit_prompts import DigitPrompts
from moe_diffusion.errors import UserError
from moe_diffusion.manifest import how_to_prepare
from moe_diffusion.own_data import find_source
from moe_diffusion.synthetic import Synthetic

Batch = dict[str, np.ndarray]
Shape = tuple[int, int, int]  # (H, W, C)
Spec = dict[str, Field]
SPLITS = ("train", "test")
TEN_CLASSES = {"label": Field((), "int32", 10)}


class Source(Protocol):
    """What every source has; the top of this file lists what a source may add."""

    image_shape: Shape
    cond_spec: Spec

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Digits:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images of 17 grey levels, 10 classes.

    The split is fixed: 1,437 training and 360 held-out images, 80/20 in every class. The images
    come with scikit-learn, so nothing is downloaded.
    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
    """

    image_shape = (8, 8, 1)
    cond_spec = TEN_CLASSES
    levels = 17

    def __init__(self, split: str):
        # Imported here because it takes a second and only this source needs it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)  # pixels 0..16
        parts = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        indices = parts[SPLITS.index(split)]
        images = pixels[indices].reshape(-1, *self.image_shape) / 8 - 1
        self.images, self.labels = images.astype(np.float32), labels[indices].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | np.ndarray) -> Batch:
        return {"image": self.images[index], "label": self.labels[index]}

    take = __getitem__


def open_source(data: Any, input_shape: Shape, cond_spec: Spec) -> Source:
    """Opens `data.source` and checks that it fits the model.

    Args:
      data: `config.data`; reads `source` (see the top of this file), `split` and
        `skip_broken`.
      input_shape: (H, W, C), the model's `input_shape`.
      cond_spec: the model's `cond_spec()`.

    Raises:
      UserError: the name or split is unknown, the data is not there, or it does not fit the model
        (see `check_fits`).
    """
    kind, _, place = data.source.partition(":")
    if kind == "latents" and place and not Path(place).exists():
        raise UserError(how_to_prepare(place, input_shape, cond_spec))
    source = open_images(data.source, input_shape, data.split, data.skip_broken, cond_spec)
    check_fits(source, data.source, input_shape, cond_spec)
    return source


def open_images(
    name: str,
    image_shape: Shape,
    split: str = "train",
    skip_broken: bool = False,
    cond_spec: Spec = TEN_CLASSES,
) -> Source:
    """Opens a source by name, without a model to fit.

    Args:
      name: see the top of this file.
      image_shape: (H, W, C) to which image files are scaled and cropped, and of the images that
        "synthetic" makes. Other sources have a shape of their own.
      split: of the sources that have splits.
      skip_broken: whether a folder may hold files that are no images.
      cond_spec: the fields that "synthetic" makes. Other sources have fields of their own.

    Raises:
      UserError: the name or split is unknown, or the data cannot be read.
    """
    if name in ("digits", "digits_prompts", "digit_pairs", "synthetic"):
        if split not in SPLITS:
            raise UserError(f"data.split={split!r} is unknown; known are: {', '.join(SPLITS)}")
        if name == "synthetic":
            return Synthetic(image_shape, cond_spec)
        prompted = {"digits_prompts": DigitPrompts, "digit_pairs": DigitPairs}.get(name)
        return prompted(Digits(split), split == "test", cond_spec) if prompted else Digits(split)
    kind, _, place = name.partition(":")
    if kind in ("folder", "latents") and split != "train":
        raise UserError(
            f"data.split={split!r} means nothing to {kind}: sources; name the folder of that split "
            "in data.source"
        )
    if kind == "folder" and place:
        return ImageFolder(place, image_shape, skip_broken)
    if kind == "latents" and place:
        return Latents(place)
    if kind == "tfds" and place:
        return TfdsImages(place, split, image_shape)
    return find_source(name, image_shape=image_shape, cond_spec=cond_spec, split=split)


def check_fits(source: Source, name: str, input_shape: Shape, cond_spec: Spec) -> None:
    """Checks that a model can train on a source.

    Args:
      source: the source.
      name: its name in `data.source`, for the message.
      input_shape: (H, W, C) of the model's input.
      cond_spec: the fields that the model takes.

    Raises:
      UserError: the source has no images of the model's shape; it lacks a field that the model
        takes, or has one that the model does not take; it knows more values of a field than the
        model; a label that is known beforehand is out of range.
    """
    shapes = [shape for shape, _ in buckets_of(source)]
    if tuple(input_shape) not in shapes:
        raise UserError(
            f"data.source={name} has images of shape {' or '.join(map(str, shapes))}, the model "
            f"takes {tuple(input_shape)}: change model.image_size, model.image_width and "
            "model.channels, or the source"
        )
    check_fields(source.cond_spec, cond_spec, f"data.source={name}")
    for field, (_, _, most) in cond_spec.items():
        has = source.cond_spec[field].num_values or np.inf
        if most and has > most:
            what, remedy = f"values of '{field}'", "choose a model that takes as many"
            if field == "label":
                what, remedy = "classes", f"set model.num_classes={has}"
            raise UserError(f"data.source={name} has {has} {what}, the model only {most}: {remedy}")
    if hasattr(source, "labels"):
        _check_values("label", source.labels, np.arange(len(source)), source.cond_spec["label"])


def stack(records: Sequence[Batch]) -> Batch:
    """Records as one batch."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def check_batch(batch: Batch, indices: Sequence[int], cond_spec: Spec) -> None:
    """Checks that a batch has the fields of `cond_spec`, with values in their range.

    Args:
      batch: {"image": any, **cond}.
      indices: the numbers of its B records in the source, for the message.
      cond_spec: of the source.

    Raises:
      UserError: a field is lacking, unexpected or of another shape or dtype, or a value of an
        integer field is outside 0..num_values-1; the message names the first such record.
    """
    check_fields(fields_of(batch), cond_spec, f"record {indices[0]} of the data")
    for name, field in cond_spec.items():
        _check_values(name, batch[name], indices, field)


def _check_values(name: str, values: np.ndarray, indices: Sequence[int], field: Field) -> None:
    most = field.num_values
    wrong = np.argwhere((values < 0) | (values >= most)) if most else ()
    if len(wrong):
        raise UserError(
            f"record {indices[wrong[0, 0]]} of the data has {name} {values[tuple(wrong[0])]}, "
            f"outside 0..{most - 1}: mend the record or the source's number of values"
        )
