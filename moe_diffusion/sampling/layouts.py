"""Folders of images for prompts, laid out as published scorers read them.

| layout          | files: N, number of the prompt; k, of its image   | beside them                |
|-----------------|---------------------------------------------------|----------------------------|
| `flat`          | `<number of the image, six digits>.png`           | `prompts.json`: a table    |
| `geneval`       | `<N, five digits>/samples/<k, four digits>.png`   | its `metadata.jsonl`       |
| `dpg`           | `<id>.png`, a grid of 2 x 2                       |                            |
| `t2i_compbench` | `samples/<prompt>_<number of the image, six>.png` |                            |
| `mjhq`          | `<category>/<id>.png`                             |                            |
| `imagereward`   | `images/<id>_<k>.png`                             | `prompts.json`: a list     |
| `mps`           | the same                                          | the same, as HPD v2 has it |

A file appears when it is whole. The hidden file `.made_with.json` says what the images were made
with, so that a later call goes on with a folder of its own settings, and with no other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moe_diffusion import locks
from moe_diffusion.errors import UserError, check_writable, shown
from moe_diffusion.figures.images import save_png, to_pixels
from moe_diffusion.reading import plain_name, read_table
from moe_diffusion.sampling.conditions import spread
from moe_diffusion.sampling.prompt_files import Item, PromptFile
from moe_diffusion.writing import save_text

MADE_WITH, PARTS = ".made_with.json", ".parts"
_GRID = 4  # images of DPG-Bench's grid


class Place(NamedTuple):
    """Which image of a folder one is.

    Attributes:
      item: its prompt.
      number: of the prompt in its file.
      k: how manieth image of that prompt it is, from 0.
      image: its number among all.
    """

    item: Item
    number: int
    k: int
    image: int


class Layout(NamedTuple):
    """How a folder is laid out.

    Attributes:
      path: of an image, below the folder.
      beside: (places, paths) -> path of every other file, and its text.
      images: of each prompt; None for any number.
      needs: benchmark whose prompts have what the layout names; "" for any prompts.
    """

    path: Callable[[Place], str]
    beside: Callable[[Sequence[Place], Sequence[str]], dict[str, str]] = lambda places, paths: {}
    images: int | None = None
    needs: str = ""


def _lines_of_geneval(places: Sequence[Place], paths: Sequence[str]) -> dict[str, str]:
    return {f"{p.number:05}/metadata.jsonl": json.dumps(p.item.record) for p in places if not p.k}


def _prompt_of_file(places: Sequence[Place], paths: Sequence[str]) -> dict[str, str]:
    told = {path: place.item.prompt for path, place in zip(paths, places, strict=True)}
    return {"prompts.json": json.dumps(told, ensure_ascii=False, indent=1) + "\n"}


def _list_of(key: str) -> Callable[[Sequence[Place], Sequence[str]], dict[str, str]]:
    """The list of prompts that ImageReward and MPS read, with the images of each under a key."""

    def beside(places: Sequence[Place], paths: Sequence[str]) -> dict[str, str]:
        found: dict[int, dict[str, Any]] = {}
        for path, (item, number, *_) in zip(paths, places, strict=True):
            table = found.setdefault(number, {"id": item.id, "prompt": item.prompt, key: []})
            table[key].append(path)
        text = json.dumps(list(found.values()), ensure_ascii=False, indent=1)
        return {"prompts.json": text + "\n"}

    return beside


LAYOUTS = {
    "flat": Layout(lambda p: f"{p.image:06}.png", _prompt_of_file),
    "geneval": Layout(
        lambda p: f"{p.number:05}/samples/{p.k:04}.png", _lines_of_geneval, needs="geneval"
    ),
    "dpg": Layout(lambda p: f"{p.item.id}.png", images=_GRID),
    "t2i_compbench": Layout(lambda p: f"samples/{_compbench_name(p.item)}_{p.image:06}.png"),
    "mjhq": Layout(lambda p: f"{_category(p.item)}/{p.item.id}.png", images=1, needs="mjhq"),
    "imagereward": Layout(lambda p: f"images/{p.item.id}_{p.k}.png", _list_of("generations")),
    "mps": Layout(lambda p: f"images/{p.item.id}_{p.k}.png", _list_of("image_path")),
}


def layout_of(file: PromptFile, asked: str | None) -> str:
    """The layout that is asked for, or else that of the file's benchmark, or `flat`."""
    return asked or (file.benchmark if file.benchmark in LAYOUTS else "flat")


def _compbench_name(item: Item) -> str:
    """A prompt as the name of a file, from which the scorer takes what is before the first "_"."""
    prompt = item.prompt
    long = len(f"{prompt}_000000.png".encode()) > 255
    if long or any(sign in prompt for sign in "/\\_\0\n"):
        raise UserError(
            f"the prompt {shown(prompt)} cannot be the name of a picture, by which T2I-CompBench "
            "knows it: it has one of / \\ _, or is too long; take --layout flat, or leave it out"
        )
    return prompt


def _category(item: Item) -> str:
    where = f"the category of {shown(item.id)}"
    return plain_name(item.category, where, "pictures lie in a folder of that name")


class Folder:
    """A folder that is filled with images for prompts, in order, and perhaps by several calls.

    Args:
      folder: absent, empty, or begun by an earlier call with the same settings.
      name: of the layout.
      file: where the prompts come from.
      num: images in all, spread over the prompts.
      settings: what the images depend on, as JSON has it.

    Raises:
      UserError: prompts, their number or the folder do not fit; nothing is written yet.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        name: str,
        file: PromptFile,
        num: int,
        settings: Mapping[str, Any],
    ):
        self.folder, self.layout = Path(folder), LAYOUTS[name]
        self.places = check(name, file, num)
        self.paths = [self.layout.path(place) for place in self.places]
        settings = {"layout": name, **settings}
        self._settings = json.loads(json.dumps(settings))
        self._check_begun()

    def begin(self) -> None:
        """Writes what is not an image."""
        save_text(json.dumps(self._settings, indent=1) + "\n", self.folder / MADE_WITH)
        for path, text in self.layout.beside(self.places, self.paths).items():
            save_text(text, self.folder / path)

    def first_missing(self) -> int:
        """The number of the first image that is not there; of all if none is missing."""
        for place, path in zip(self.places, self.paths, strict=True):
            part = self._part(place)
            if not (self.folder / path).is_file() and not (part and part.is_file()):
                return place.image
        return len(self.places)

    def write(self, images: np.ndarray, first: int, fields: Mapping[str, str]) -> None:
        """Writes images f32[b, H, W, C] in [-1, 1], of which the first has the number `first`.

        Args:
          fields: that every file carries, beside its prompt and its number; see `save_png`.
        """
        pixels, _ = to_pixels(np.asarray(images, np.float32))
        for picture, place in zip(pixels, self.places[first : first + len(pixels)], strict=True):
            text = {"prompt": place.item.prompt, "image": str(place.image), **fields}
            target = self.folder / self.paths[place.image]
            part = self._part(place)
            if part and target.is_file():
                continue  # an earlier call has made the grid
            save_png(Image.fromarray(picture), part or target, text)
            if part:
                self._join(place, text)

    def _join(self, place: Place, text: Mapping[str, str]) -> None:
        """Makes the grid of a prompt once all of its images are there."""
        first = place.image - place.k
        parts = [self._part(other) for other in self.places[first : first + _GRID]]
        if not all(part.is_file() for part in parts):
            return
        pictures = [Image.open(part) for part in parts]
        width, height = pictures[0].size
        grid = Image.new(pictures[0].mode, (2 * width, 2 * height))
        for number, picture in enumerate(pictures):
            grid.paste(picture, (number % 2 * width, number // 2 * height))
            picture.close()
        save_png(grid, self.folder / self.paths[place.image], text)
        for part in parts:
            part.unlink()

    def finish(self) -> None:
        """Removes what images waited in, and half files of a killed call; the last call."""
        for path in self.folder.rglob(".*.part"):
            path.unlink()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def _part(self, place: Place) -> Path | None:
        """Where an image waits for the others of its grid; None if it is a file of its own."""
        if self.layout.images != _GRID:
            return None
        return self.folder / PARTS / f"{place.item.id}_{place.k}.png"

    def _check_begun(self) -> None:
        """Raises a UserError if the folder holds something else than images of these settings."""
        check_folder(self.folder)
        begun = self.folder / MADE_WITH
        if not begun.exists():
            return
        found = read_table(begun, f"choose another folder than {self.folder}")
        for key in {**self._settings, **found}:
            if found.get(key) != self._settings.get(key):
                raise UserError(
                    f"{self.folder} has images of other settings ({key}: {shown(found.get(key))} "
                    f"instead of {shown(self._settings.get(key))}): choose another folder, or "
                    "empty this one"
                )


def check_folder(folder: str | os.PathLike) -> None:
    """Raises a UserError unless a folder is absent, empty, or begun by an earlier call."""
    if "://" in os.fspath(folder):
        raise UserError(f"{folder} is remote: write into a local folder and copy it there")
    folder = Path(folder)
    check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    names = os.listdir(folder) if folder.is_dir() else []
    others = [name for name in names if not name.startswith(".") and name != locks.NAME]
    if others and MADE_WITH not in names:
        raise UserError(
            f"{folder} is not empty, and was not begun by such a call: choose another folder, or "
            "empty this one"
        )


def check(name: str, file: PromptFile, num: int) -> list[Place]:
    """The place of every image in a layout.

    Raises:
      UserError: the layout is unknown or is for other prompts, it takes another number of images,
        a prompt cannot be the name of a file, or two images would have one.
    """
    if name not in LAYOUTS:
        raise UserError(f"--layout {shown(name)} is not known: choose one of {', '.join(LAYOUTS)}")
    layout, items = LAYOUTS[name], file.items
    if layout.needs and file.benchmark != layout.needs:
        raise UserError(
            f"--layout {name} names what only prompts of {layout.needs} have: give its file, and "
            f"--benchmark {layout.needs}"
        )
    each, rest = divmod(num, len(items))
    if layout.images and (rest or each != layout.images):
        raise UserError(
            f"--layout {name} has {layout.images} images of each prompt, not {num} of "
            f"{len(items)}: ask for as many"
        )
    places, counted = [], [0] * len(items)
    for image, number in enumerate(spread(num, len(items)).tolist()):
        places.append(Place(items[number], number, counted[number], image))
        counted[number] += 1
    paths: set[str] = set()
    for place in places:
        path = layout.path(place)
        if path in paths and layout.images != _GRID:
            raise UserError(f"--layout {name}: two images would be {path}: rename one")
        paths.add(path)
    return places
