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

import os
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion import pictures
from moe_diffusion.errors import UserError, shown
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
from moe_diffusion.reading import lines, table_of

METADATA, SHARED = "metadata.jsonl", "caption.txt"
_KEYS, _JOURNEY_KEYS = ("text", "captions"), ("prompt", "Task2.Caption")
_IMAGES = "imgs"  # of JourneyDB


class TextFiles(Pairs):
    """Images whose captions lie in files beside them."""

    def texts(self, index: int) -> list[str]:
        path = self._pairs[index].texts
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
        return Pairs(read_metadata(folder, keys_of(key, _KEYS)))
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


def read_metadata(folder: Path, keys: Sequence[str] = _KEYS) -> list[Pair]:
    """The image and the captions of every line of a folder's `metadata.jsonl`.

    Raises:
      UserError: there is no such file, it has no lines, or one names a file outside of the folder.
    """
    return _read_lines(folder / METADATA, "file_name", keys, (folder,))


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
    folder = path.parent
    places = (folder / _IMAGES, folder)
    return Pairs(_read_lines(path, "img_path", keys_of(key, _JOURNEY_KEYS), places))


def _read_lines(path: Path, image: str, keys: Sequence[str], folders: Sequence[Path]) -> list[Pair]:
    """A pair of every line of a file .jsonl.

    Args:
      image: the key of the image's path.
      keys: those of the captions.
      folders: where the image may lie.
    """
    pairs = []
    for number, line in lines(path, path.name):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                pairs.append(_of_line(line, where, image, keys, folders))
            except Unusable as defect:
                pairs.append(Pair(where, defect=defect))
    if not pairs:
        raise UserError(f"{path} has no lines: nothing to prepare")
    return pairs


def _of_line(
    line: str, where: str, image: str, keys: Sequence[str], folders: Sequence[Path]
) -> Pair:
    row = table_of(line)
    needed = f"{image} and {' or '.join(keys)}"
    name = (row or {}).get(image)
    try:
        texts = texts_at(row or {}, keys)
    except ValueError as error:
        raise Unusable(BROKEN_TEXT, f"{where}: {error}: mend it, {SKIP}") from None
    if name is None or texts is None:
        raise Unusable(BROKEN_TEXT, f"{where} is no object with {needed}: mend it, {SKIP}")
    if not isinstance(name, str):
        raise Unusable(BROKEN_TEXT, f"{where}: {image} is {shown(name)}, no text: mend it, {SKIP}")
    file = inside(name, where)
    paths = [path for path in (folder / file for folder in folders) if os.path.isfile(path)]
    if not paths:
        message = f"{where} names {shown(name)}, which is not there: restore it, {SKIP}"
        raise Unusable(NO_IMAGE, message)
    return Pair(str(paths[0]), str(paths[0]), usable(texts, where))
