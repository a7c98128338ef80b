"""Images with captions as a source of `prepare`, from places of several kinds.

* `folder:<path>`: images with `metadata.jsonl`, or a .txt beside each (`caption_folder.py`)
* `webdataset:<tars>`: tar shards of LAION, COYO, CC12M (`webdataset.py`)
* `journeydb:<path>`: JourneyDB's annotations and `imgs/` (`caption_folder.py`)
* `tfds:<name or folder>`: prepared by TensorFlow Datasets, with a feature of texts
  (`caption_tfds.py`)

A path without one of these words is a folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_diffusion import pictures
from moe_diffusion.caption_records import CAPTIONS, MOST
from moe_diffusion.conditions import Field
from moe_diffusion.data.images import to_array
from moe_diffusion.errors import UserError
from moe_diffusion.interop.prompts import PromptEncoders
from moe_diffusion.preparing.caption_folder import open_folder, open_journeydb
from moe_diffusion.preparing.caption_tfds import TfdsPairs
from moe_diffusion.preparing.pairs import SKIP, SMALL, UNREADABLE, LeftOut, Pair, Pairs, Unusable
from moe_diffusion.preparing.webdataset import open_shards

# Kind -> (place, key of the captions or None, split) -> its images with captions.
KINDS: dict[str, Callable[[str, str | None, str], Pairs]] = {
    "folder": lambda place, key, split: open_folder(place, key),
    "webdataset": lambda place, key, split: open_shards(place, key),
    "journeydb": lambda place, key, split: open_journeydb(place, key),
    "tfds": lambda place, key, split: TfdsPairs(place, split, key),
}
_TEXTS = "texts"  # in a record that `complete` has not seen yet
Record = dict[str, Any]


def open_pairs(
    name: str, key: str | None = None, split: str = "train", skip_broken: bool = True
) -> Pairs:
    """The images with captions of a place; see the top of this file.

    Args:
      name: KIND:PATH.
      key: the keys or the feature that hold captions; None takes the usual ones of the kind.
      split: of "tfds".
      skip_broken: whether images may have defects.

    Raises:
      UserError: the kind is unknown, or nothing of it is at the path; or an image has a defect
        that is known without reading it.
    """
    kind, colon, place = name.partition(":")
    if colon and kind in KINDS and place:
        pairs = KINDS[kind](place, key, split)
    elif colon and re.fullmatch("[a-z_0-9]+", kind):
        known = ", ".join(f"{kind}:PATH" for kind in KINDS)
        raise UserError(f"--captions {name} is of no known kind: known are {known}")
    else:
        pairs = open_folder(name, key)
    for index in () if skip_broken else range(len(pairs)):
        if defect := pairs.pair(index).defect:
            raise defect
    return pairs


class Captioned:
    """The source of such images: records of an image, its texts and, if given, a guidance scale.

    `read` gives an image with its captions. `complete` encodes the captions of a batch, because an
    encoder takes many at once.

    Args:
      pairs: of `open_pairs`.
      image_shape: (H, W, C) of the images; see `data.images.to_array`.
      encoders: what encodes the captions.
      per_image: how many captions of an image are stored, its first ones. An image with fewer
        repeats them, see `caption_records`.
      guidance: value of a field "guidance" f32 in every record, for models that were distilled
        from guided ones; None: there is no such field.
      min_size: pixels of the shorter side; images below it are unusable.
      skip_broken: images that are unusable are named on stderr and left out.

    Raises:
      UserError: `per_image` is not possible.
    """

    def __init__(
        self,
        pairs: Pairs,
        image_shape: tuple[int, int, int],
        encoders: PromptEncoders,
        per_image: int = 1,
        guidance: float | None = None,
        min_size: int = 0,
        skip_broken: bool = False,
    ):
        if not 1 <= per_image <= MOST:
            raise UserError(f"--captions-per-image {per_image} is not in 1..{MOST}: 1 is usual")
        self.image_shape, self.skip_broken, self.min_size = image_shape, skip_broken, min_size
        self._pairs, self._encoders, self._per_image = pairs, encoders, per_image
        self._fixed = {} if guidance is None else {"guidance": np.float32(guidance)}
        self.cond_spec = encoders.cond_spec | {n: Field((), "float32") for n in self._fixed}

    def __len__(self) -> int:
        return len(self._pairs)

    def settings(self) -> dict[str, Any]:
        """What the manifest says of several captions, see `caption_records`; {} with one."""
        if self._per_image == 1:
            return {}
        names = list(self._encoders.cond_spec)
        return {CAPTIONS: {"per_image": self._per_image, "fields": names}}

    def make_null(self) -> dict[str, np.ndarray]:
        """The fields of the empty prompt, {field: [*shape]} of one sample."""
        return {name: values[0] for name, values in self._encoders.encode([""]).items()}

    def read(self, index: int) -> Record | LeftOut:
        """{"image", "texts"} of record `index`, or why it is left out, if that is allowed."""
        try:
            pair = self._pairs.pair(index)
            if pair.defect:
                raise pair.defect
            texts = self._pairs.texts(pair)[: self._per_image]
            return {"image": self._pixels(pair), _TEXTS: texts}
        except Unusable as error:
            if not self.skip_broken:
                raise
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return LeftOut(error.reason)

    def _pixels(self, pair: Pair) -> np.ndarray:
        """f32[H, W, C]."""
        name, image = pair.name, self._pairs.image(pair)
        read = pictures.from_array if isinstance(image, np.ndarray) else pictures.read
        try:
            picture = read(image, name, f"restore it, {SKIP}")
        except UserError as error:
            raise Unusable(UNREADABLE, str(error)) from None
        if min(picture.size) < self.min_size:
            width, height = picture.size
            raise Unusable(
                SMALL,
                f"{name} has {height}x{width} pixels, and --min-size is {self.min_size}: lower "
                f"that, {SKIP}",
            )
        return to_array(picture, self.image_shape)

    def picture_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the picture of record `index`; None if `read` may leave it out."""
        pair = self._pairs.pair(index)
        try:
            image = None if pair.defect else self._pairs.image(pair)
        except Unusable:
            image = None  # `read` says what is wrong
        if image is None:
            return None
        return pictures.size_of(image, pair.name, f"restore it, {SKIP}", self.skip_broken)

    def complete(self, records: list[Record]) -> list[Record]:
        """The records with the fields of `cond_spec` in place of their captions."""
        fields = self._encoders.encode([text for record in records for text in record[_TEXTS]])
        made, first = [], 0
        for record in records:
            count = len(record[_TEXTS])
            rows = first + np.arange(self._per_image) % count
            texts = {name: values[rows] for name, values in fields.items()}
            if self._per_image == 1:
                texts = {name: values[0] for name, values in texts.items()}
            else:
                texts[CAPTIONS] = np.uint8(count)
            made.append({"image": record["image"], **texts, **self._fixed})
            first += count
        return made

    def name(self, index: int) -> str:
        """What messages call the image of record `index`."""
        return self._pairs.pair(index).name
