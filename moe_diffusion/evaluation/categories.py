"""What the images of an observation are counted under: their classes, or categories of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.digit_prompts import VOCABULARY, digit_of
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.labels import LABEL

NULL = "null"  # the key of "no condition"


class Categories(NamedTuple):
    """Categories of N images.

    Attributes:
      kind: what they are, "class" or "prompt".
      names: of all categories; the keys in routing.json.
      of: i64[N], the category of each image.
      shown: their names for people.
    """

    kind: str
    names: tuple[str, ...]
    of: np.ndarray
    shown: tuple[str, ...]

    def take(self, chosen: np.ndarray) -> Categories:
        """Those of chosen images."""
        return self._replace(of=self.of[chosen])


def categories(
    model: Model,
    cond: Mapping[str, np.ndarray],
    texts: Sequence[str] | None,
    given: Mapping[str, str],
    known: Classes = NOTHING,
) -> Categories | None:
    """The label of every image, or else the category of its prompt; None if it has neither.

    A prompt's category is that of the file of prompts, or the digit that it asks for, or itself.

    Args:
      cond: of the N images.
      texts: the prompt of every image.
      given: prompt -> category.
      known: has the names of classes.
    """
    if LABEL in cond:
        names = tuple(map(str, range(model.cond_spec()[LABEL].num_values)))
        return Categories("class", names, cond[LABEL], tuple(map(known.name, range(len(names)))))
    if texts is None:
        return None
    digits = getattr(model, "vocabulary", "") == VOCABULARY
    found = [given.get(text) or (digits and digit_of(text)) or text for text in texts]
    found = [f"'{NULL}'" if name == NULL else name for name in found]
    names = tuple(sorted(set(found)) if digits or given else dict.fromkeys(found))
    places = {name: place for place, name in enumerate(names)}
    return Categories("prompt", names, np.array([places[name] for name in found]), names)
