"""Fields of a condition whose rows are made when they are asked for.

The states of T5 are 4 MB a prompt: those of 30,000 prompts fit no machine. What stands here looks
like an array [N, ...] to whoever draws batch after batch, and holds the rows of a few prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]


class LazyField:
    """One field of N images, [N, ...]. An index makes the rows that it takes, as a numpy array.

    Attributes:
      shape, dtype, ndim: as of an array.
    """

    def __init__(self, window: Window, name: str, rows: np.ndarray):
        made = window.made[name]
        self._window, self._name, self._rows = window, name, rows
        self.shape, self.dtype = (len(rows), *made.shape[1:]), made.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """index: a number, a slice, or an array of numbers or truth values."""
        places = np.arange(len(self._rows))[index]
        last = int(places.max(initial=-1))
        asked = self._rows[places]
        found = self._window.rows(self._name, np.atleast_1d(asked), self._rows[last + 1 :])
        return found.reshape(*np.shape(asked), *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def reordered(self, order: np.ndarray) -> LazyField:
        """The rows `order`, still to be made."""
        return LazyField(self._window, self._name, self._rows[order])


class Window:
    """What an encoder makes of some of many prompts; the fields of a condition share it.

    Args:
      encode: prompts -> {field: [n, ...]}.
      prompts: each once.
      at_once: so many are encoded together, or as many as one batch of images asks for.
      first: numbers of the prompts that will be asked for first.
    """

    def __init__(self, encode: Encode, prompts: Sequence[str], at_once: int, first: np.ndarray):
        self._encode, self._prompts, self._at_once = encode, prompts, at_once
        self.made: dict[str, np.ndarray] = {}
        self._places: dict[int, int] = {}
        self._fill([], first)

    def rows(self, name: str, wanted: np.ndarray, following: np.ndarray) -> np.ndarray:
        """The rows of the prompts `wanted` (numbers); those of `following` come next."""
        if not self._places.keys() >= set(wanted.tolist()):
            self._fill(list(dict.fromkeys(wanted.tolist())), following)
        return self.made[name][[self._places[number] for number in wanted.tolist()]]

    def _fill(self, wanted: list[int], following: np.ndarray) -> None:
        chosen = dict.fromkeys(wanted)
        for number in map(int, following):
            if len(chosen) >= self._at_once:
                break
            chosen[number] = None
        kept = [number for number in chosen if number in self._places]
        new = [number for number in chosen if number not in self._places]
        made = self._encode([self._prompts[number] for number in new])
        if kept:
            places = [self._places[number] for number in kept]
            made = {name: np.concatenate([self.made[name][places], made[name]]) for name in made}
        self.made = made
        self._places = {number: place for place, number in enumerate([*kept, *new])}


def lazy_fields(
    encode: Encode, prompts: Sequence[str], rows: np.ndarray, at_once: int
) -> dict[str, LazyField]:
    """The fields of images, of which image i shows prompt rows[i]; see `Window`."""
    window = Window(encode, prompts, at_once, rows)
    return {name: LazyField(window, name, rows) for name in window.made}


def reordered(cond: Mapping[str, Any], order: np.ndarray) -> dict[str, Any]:
    """A condition in another order of the images; what is lazy stays so."""
    return {
        name: values.reordered(order) if isinstance(values, LazyField) else values[order]
        for name, values in cond.items()
    }
