"""Images with captions that TensorFlow Datasets has prepared as array_record."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_diffusion.data.tfds import open_records
from moe_diffusion.preparing.pairs import BROKEN_TEXT, Pair, Pairs, Unusable, keys_of, usable

_USUAL = ("caption",)


class TfdsPairs(Pairs):
    """A prepared dataset with the features "image" and, for captions, a text or a list of texts.

    Args:
      place: a name or a folder, see `data.tfds.TfdsImages`.
      split: of the dataset.
      key: the feature of the captions; "captions.text" is text inside of captions.

    Raises:
      UserError: it is not prepared, or has no such split or feature.
    """

    def __init__(self, place: str, split: str, key: str | None = None):
        (self._key,) = keys_of(key, _USUAL)[:1]
        first = self._key.split(".")[0]
        features, self._records = open_records(place, split, first)
        self._place = place

    def __len__(self) -> int:
        return len(self._records)

    def pair(self, index: int) -> Pair:
        return Pair(f"record {index} of tfds:{self._place}", index, index)

    def image(self, pair: Pair) -> bytes | np.ndarray:
        return self._records[pair.image]["image"]

    def texts(self, pair: Pair) -> list[str]:
        texts = _at(self._records[pair.texts], self._key.split("."))
        if not all(isinstance(text, str | bytes) for text in texts):
            message = f"{pair.name}: {self._key} holds no texts: see --caption-key"
            raise Unusable(BROKEN_TEXT, message)
        return usable(texts, pair.name)


def _at(value: Any, parts: list[str]) -> list[Any]:
    """The values at a path through tables and lists."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [found for item in value for found in _at(item, parts)]
    if not parts:
        return [value]
    return _at(value[parts[0]], parts[1:]) if isinstance(value, dict) and parts[0] in value else []
