"""Images with captions that TensorFlow Datasets has prepared as array_record."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_diffusion.data.tfds import open_records
from moe_diffusion.preparing.pairs import BROKEN_TEXT, Pairs, Unusable, keys_of, usable

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

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def name(self, index: int) -> str:
        return f"record {index} of tfds:{self._place}"

    def defect(self, index: int) -> None:
        """Nothing is known before a record is read."""

    def image(self, index: int) -> bytes | np.ndarray:
        return self._records[index]["image"]

    def texts(self, index: int) -> list[str]:
        texts, name = _at(self._records[index], self._key.split(".")), self.name(index)
        if not all(isinstance(text, str | bytes) for text in texts):
            raise Unusable(BROKEN_TEXT, f"{name}: {self._key} holds no texts: see --caption-key")
        return usable(texts, name)


def _at(value: Any, parts: list[str]) -> list[Any]:
    """The values at a path through tables and lists."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [found for item in value for found in _at(item, parts)]
    if not parts:
        return [value]
    return _at(value[parts[0]], parts[1:]) if isinstance(value, dict) and parts[0] in value else []
