"""Images with captions in places of any kind: what `captions.Captioned` asks of such a place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_diffusion.errors import UserError, shown

# Why an image may be left out, as the manifest counts it.
UNREADABLE, SMALL = "unreadable image", "small image"
BROKEN_TEXT, NO_TEXT, NO_IMAGE = "broken text", "no text", "no image"
LONGEST = 1 << 20  # bytes of the captions of an image
SKIP = "or leave out what is broken (--skip-broken)"


class LeftOut(str):
    """In place of a record: why it is left out."""


class Unusable(UserError):
    """An image or its captions cannot be used. `reason` is one of those above."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Pair(NamedTuple):
    """One image with its captions, of which nothing is read yet.

    Attributes:
      name: what messages call it.
      image: where the image is.
      texts: the captions, or where they are.
      defect: what makes it unusable, as far as that is known without reading it.
    """

    name: str
    image: Any = None
    texts: Any = None
    defect: Unusable | None = None


class Pairs:
    """The images with captions of one place, in an order that depends on nothing else.

    A kind of place is a function (place, key) -> Pairs; `captions.KINDS` lists them. A place of
    millions of images overrides `pair` and keeps less of each.
    """

    def __init__(self, pairs: Sequence[Pair]):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """Image `index`, which is not read."""
        return self._pairs[index]

    def image(self, pair: Pair) -> str | bytes | np.ndarray:
        """The image of a pair: a path, the content of a file, or pixels. May raise Unusable."""
        return pair.image

    def texts(self, pair: Pair) -> list[str]:
        """Its captions, none of them empty. Raises Unusable if one is broken or there is none."""
        return usable(pair.texts, pair.name)


def usable(texts: Iterable[str | bytes], name: str) -> list[str]:
    """The captions that are not empty, each once, without the spaces around them.

    Args:
      name: what they are called in messages.

    Raises:
      Unusable: one is no text in UTF-8, or all are empty.
    """
    found: dict[str, None] = {}
    for text in texts:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig", errors="replace")
        if "\ufffd" in text or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise Unusable(BROKEN_TEXT, f"{name}: its text is no UTF-8: write it in UTF-8, {SKIP}")
        if text.strip():
            found[text.strip()] = None
    if not found:
        raise Unusable(BROKEN_TEXT, f"{name}: its text is empty: write one, {SKIP}")
    return list(found)


def texts_at(table: Mapping[str, Any], keys: Sequence[str]) -> list[str] | None:
    """The captions under some keys of a table: each a text or a list of texts.

    Args:
      keys: "Task2.Caption" is the key Caption of the table Task2. Keys that are not there are left
        out.

    Returns:
      The captions in the order of the keys, or None without any key.

    Raises:
      ValueError: a value is something else; the message says what.
    """
    found: list[str] | None = None
    for key in keys:
        value: Any = table
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else value
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{key} is {shown(value)}, no text and no list of texts")
        found = (found or []) + texts
    return found


def keys_of(key: str | None, usual: Sequence[str]) -> tuple[str, ...]:
    """The keys that `--caption-key` names, separated by commas, or else the usual ones."""
    return tuple(part.strip() for part in key.split(",") if part.strip()) if key else tuple(usual)


def inside(name: str, where: str) -> str:
    """A path inside of a folder or archive, with single slashes; "./a" is "a".

    Raises:
      UserError: it is absolute, or climbs out.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{where} names {shown(name)}, which leads out of it: take another")
    return "/".join(part for part in parts if part not in ("", "."))
