"""Folders of images with captions, and JourneyDB.

| what lies in the folder                                     | captions of an image               |
|-------------------------------------------------------------|------------------------------------|
| `metadata.jsonl`: {"file_name": "a/1.png", "text": "..."}   | `text`, and the list `captions`    |
| else `a/1.txt` beside `a/1.jpg`, in sub-folders, too        | the whole file                     |
| else `caption.txt` in the folder of `1.jpg`                 | the whole file, for all its images |
| JourneyDB's `*.jsonl` beside `imgs/`                        | `prompt`, then `Task2.Caption`     |

`metadata.jsonl` is as the image folders of Hugging Face's `datasets` have it. Other keys are
ignored.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from moe_diffusion import pictures
from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.preparing.pairs import (
    BROKEN_TEXT,
    LONGEST,
    NO_IMAGE,
    NO_TEXT,
    SKIP,
    Pair,
    Pairs,
    Unusable,
    inside,
    keys_of,
    texts_at,
    usable,
)
from moe_diffusion.reading import regular_file, table_of

METADATA, SHARED = "metadata.jsonl", "caption.txt"
_KEYS, _JOURNEY_KEYS = ("text", "captions"), ("prompt", "Task2.Caption")
_IMAGES = "imgs"  # of JourneyDB


class TextFiles(Pairs):
    """Images whose captions lie in files beside them."""

    def texts(self, pair: Pair) -> list[str]:
        path = pair.texts
        try:
            with open(path, "rb") as file:
                data = file.read(LONGEST + 1)
        except OSError as error:
            raise Unusable(BROKEN_TEXT, f"cannot read {path} ({error.strerror}): {SKIP}") from None
        if len(data) > LONGEST:
            raise Unusable(BROKEN_TEXT, f"{path} is larger than {LONGEST:,} bytes: cut it, {SKIP}")
        return usable([data], path)


def open_folder(place: str, key: str | None = None) -> Pairs:
    """The images of a folder; see the table above.

    Args:
      key: the keys of `metadata.jsonl` that hold captions, with commas between them.

    Raises:
      UserError: there is no such folder, it holds no captions, or `metadata.jsonl` names a file
        outside of the folder.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise UserError(f"there is no folder {place}: name one with images and captions")
    if (folder / METADATA).exists():
        return Lines(folder / METADATA, "file_name", keys_of(key, _KEYS), (folder,))
    found = [_beside(path) for path in pictures.below(folder)]
    if not any(pair.texts for pair in found):
        raise UserError(
            f'no {METADATA} in {place} and no .txt beside its images: write a line {{"file_name": '
            '..., "text": ...}} per image, or a.txt beside a.jpg'.replace("}}", "}")
        )
    return TextFiles(found + _alone(folder, {pair.texts for pair in found}))


def _beside(image: str) -> Pair:
    shared = os.path.join(os.path.dirname(image), SHARED)
    for path in (os.path.splitext(image)[0] + ".txt", shared):
        if os.path.isfile(path):
            return Pair(image, image, path)
    message = f"{image} has no .txt beside it: write its caption there, {SKIP}"
    return Pair(image, defect=Unusable(NO_TEXT, message))


def _alone(folder: Path, known: set[str]) -> list[Pair]:
    """Texts that are beside no image."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(filter(pictures.counts, folders))
        for name in sorted(filter(pictures.counts, names)):
            path = os.path.join(place, name)
            if name.lower().endswith(".txt") and name != SHARED and path not in known:
                message = f"{path} has no image beside it: restore the image, {SKIP}"
                found.append(Pair(path, defect=Unusable(NO_IMAGE, message)))
    return found


def open_journeydb(place: str, key: str | None = None) -> Pairs:
    """JourneyDB: an annotation file, or the folder with one; `img_path` is a file below `imgs/`.

    Args:
      key: the keys that hold captions, with commas between them: prompt, or Task2.Caption.

    Raises:
      UserError: there is no annotation file or several, or a line names a file outside of it.
    """
    path = Path(place)
    if path.is_dir():
        found = sorted(p for p in path.glob("*.jsonl") if pictures.counts(p.name))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise UserError(f"{place} must hold one .jsonl of annotations, it has {names}: name it")
        path = found[0]
    places = (path.parent / _IMAGES, path.parent)
    return Lines(path, "img_path", keys_of(key, _JOURNEY_KEYS), places)


class Lines(Pairs):
    """The images of a file of JSON objects, one a line. It is read again for every image.

    Args:
      path: the file.
      image: the key of the image's path.
      keys: those of the captions.
      folders: where the image may lie.

    Raises:
      UserError: there is no such file, it has no lines, or one names a file outside of the folder.
    """

    def __init__(self, path: Path, image: str, keys: Sequence[str], folders: Sequence[Path]):
        self._path, self._image, self._keys, self._folders = path, image, keys, folders
        self._numbers, self._offsets, offset = array("q"), array("q"), 0
        regular_file(path, path.name)
        with (
            explained(f"cannot read {path}", "mend the access", (OSError,)),
            path.open("rb") as file,
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._numbers.append(number)
                    self._offsets.append(offset)
                    self._check_inside(line, number)
                offset += len(line)
        if not self._offsets:
            raise UserError(f"{path} has no lines: nothing to prepare")

    def __len__(self) -> int:
        return len(self._offsets)

    def pair(self, index: int) -> Pair:
        where = f"line {self._numbers[index]} of {self._path}"
        with self._opened() as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return self._parsed(line, where)
        except Unusable as defect:
            return Pair(where, defect=defect)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with explained(f"cannot read {self._path}", "mend the access", (OSError,)):
            with self._path.open("rb") as file:
                yield file

    def _check_inside(self, line: bytes, number: int) -> None:
        name = (_table(line) or {}).get(self._image)
        if isinstance(name, str):
            inside(name, f"line {number} of {self._path}")

    def _parsed(self, line: bytes, where: str) -> Pair:
        row = _table(line) or {}
        name = row.get(self._image)
        try:
            texts = texts_at(row, self._keys)
        except ValueError as error:
            raise Unusable(BROKEN_TEXT, f"{where}: {error}: mend it, {SKIP}") from None
        if name is None or texts is None:
            needed = f"{self._image} and {' or '.join(self._keys)}"
            raise Unusable(BROKEN_TEXT, f"{where} is no object with {needed}: mend it, {SKIP}")
        if not isinstance(name, str):
            message = f"{where}: {self._image} is {shown(name)}, no text: mend it, {SKIP}"
            raise Unusable(BROKEN_TEXT, message)
        file = inside(name, where)
        for folder in self._folders:
            if os.path.isfile(folder / file):
                return Pair(str(folder / file), str(folder / file), usable(texts, where))
        message = f"{where} names {shown(name)}, which is not there: restore it, {SKIP}"
        raise Unusable(NO_IMAGE, message)


def _table(line: bytes) -> dict[str, Any] | None:
    return table_of(line.decode(errors="replace"))
