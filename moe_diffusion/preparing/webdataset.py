"""Images with captions in tar shards, as LAION, COYO and CC12M are downloaded with img2dataset.

The files of one image have one stem, the name up to its first full stop: `000012.jpg`,
`000012.txt`, `000012.json`. The shards are not unpacked. They are read once for the places of their
files, and after that in any order.
"""

from __future__ import annotations

import functools
import glob
import itertools
import multiprocessing
import os
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from moe_diffusion import pictures
from moe_diffusion.errors import UserError, explained
from moe_diffusion.preparing.pairs import (
    BROKEN_TEXT,
    LONGEST,
    NO_IMAGE,
    NO_TEXT,
    SKIP,
    UNREADABLE,
    Pair,
    Pairs,
    Unusable,
    inside,
    keys_of,
    texts_at,
    usable,
)
from moe_diffusion.reading import table_of

KINDS = ("image", "txt", "json")  # of the files of an image
_USUAL = ("caption", "captions")  # keys of the .json
_IMAGES = tuple(suffix[1:] for suffix in pictures.SUFFIXES)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # shards
_LARGEST = 1 << 28  # bytes of an image
_EACH = 16  # shards for which a process is worth its start
_BLOCK = 512  # bytes of a tar's header
_COPY = "download it again"


class Member(NamedTuple):
    """A file inside of a tar: which tar, and the bytes there."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content, shorter than `size` if the tar has been cut since."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Shard(NamedTuple):
    """A tar of N images.

    Attributes:
      path: of the tar.
      stems: of the images, with line ends between them; a name in a tar has none.
      places: i64[N, 3, 2]: offset and size of the image, the .txt and the .json; a size of -1 says
        that there is none.
    """

    path: str
    stems: str
    places: np.ndarray


class Shards(Pairs):
    """The images of tar shards. An image takes some 60 bytes of memory.

    Args:
      key: see `open_shards`.
    """

    def __init__(self, shards: list[Shard], key: str | None):
        self._shards, self._keys = shards, keys_of(key, _USUAL)
        self._kinds = KINDS[2:] if key else KINDS[1:]
        self._starts = np.cumsum([0, *(len(shard.places) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pair(self, index: int) -> Pair:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, row = self._shards[number], index - int(self._starts[number])
        name = f"{shard.path}: {_lines(shard.stems)[row]}"
        files = {
            kind: Member(shard.path, offset, size)
            for kind, (offset, size) in zip(KINDS, shard.places[row].tolist(), strict=True)
            if size >= 0
        }
        if "image" not in files:
            return Pair(name, defect=Unusable(NO_IMAGE, f"{name} has no image: pack it, {SKIP}"))
        texts = {kind: files[kind] for kind in self._kinds if kind in files}
        if not texts:
            beside = " or ".join(f".{kind}" for kind in self._kinds)
            defect = Unusable(NO_TEXT, f"{name} has no {beside} beside it: pack one, {SKIP}")
            return Pair(name, files["image"], defect=defect)
        return Pair(name, files["image"], texts)

    def image(self, pair: Pair) -> bytes:
        return _content(pair.image, pair.name, UNREADABLE, _LARGEST)

    def texts(self, pair: Pair) -> list[str]:
        content = {
            kind: _content(member, f"{pair.name}.{kind}", BROKEN_TEXT, LONGEST)
            for kind, member in pair.texts.items()
        }
        found: list[str | bytes] = [content["txt"]] if "txt" in content else []
        if "json" in content:
            try:
                found += self._of_json(content["json"], f"{pair.name}.json")
            except Unusable:
                if not found:
                    raise
        return usable(found, f"{pair.name}.{'txt' if 'txt' in content else 'json'}")

    def _of_json(self, content: bytes, name: str) -> list[str]:
        try:
            texts = texts_at(table_of(content.decode("utf-8-sig")) or {}, self._keys)
        except ValueError as error:  # no UTF-8, too
            raise Unusable(BROKEN_TEXT, f"{name}: {error}: mend it, {SKIP}") from None
        if texts is None:
            keys = " and no ".join(self._keys)
            raise Unusable(BROKEN_TEXT, f"{name} is no object or has no {keys}: mend it, {SKIP}")
        return texts


def open_shards(place: str, key: str | None = None) -> Shards:
    """The images of tar shards.

    Args:
      place: a tar, a folder of tars, a pattern like /data/*.tar, or numbers like
        /data/{00000..00012}.tar.
      key: the keys of the .json that hold captions, with commas between them; then the .txt is
        not read.

    Raises:
      UserError: there is no such tar; one is damaged or cut, has links or sparse files, a path
        that leads out of it, or two files of one name; or there is no image.
    """
    shards = _indices(shards_of(place))
    if not any((shard.places[:, 0, 1] >= 0).any() for shard in shards):
        raise UserError(f"{place} holds no images ({', '.join(_IMAGES)}): name tars with some")
    return Shards(shards, key)


def shards_of(place: str) -> list[str]:
    """The tars that a place names, see `open_shards`. Raises a UserError if there is none."""
    if os.path.isdir(place):
        found = sorted(glob.glob(os.path.join(glob.escape(place), "*.tar")))
        found = [path for path in found if pictures.counts(os.path.basename(path))]
        if not found:
            raise UserError(f"{place} holds no .tar: name a folder of tar shards")
        return found
    found = []
    for path in [place] if os.path.exists(place) else _expanded(place):
        matching = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matching:
            raise UserError(f"there is no tar at {path}: download it, or name those that are there")
        found += matching
    for path in found:
        if not os.path.isfile(path):
            raise UserError(f"{path} is no regular file: name tars")
    return list(dict.fromkeys(found))


def _expanded(place: str) -> list[str]:
    """ "a{08..10}.tar" -> a08.tar, a09.tar, a10.tar; "{a,b}.tar" -> a.tar, b.tar."""
    choices, count = [], 1
    for number, part in enumerate(_BRACES.split(place)):  # every other part is inside of braces
        ends = _RANGE.fullmatch(part) if number % 2 else None
        if ends:
            first, last, width = int(ends[1]), int(ends[2]), len(ends[1])
            if last < first:
                raise UserError(f"{place}: {{{part}}} counts down: give the smaller number first")
            options = range(first, last + 1)
        else:
            options, width = part.split(",") if number % 2 else [part], 0
        count *= len(options)
        if count > _MOST:
            raise UserError(f"{place} names more than {_MOST:,} tars: name fewer")
        choices.append([f"{option:0{width}}" if ends else option for option in options])
    return ["".join(parts) for parts in itertools.product(*choices)]


def _indices(shards: list[str]) -> list[Shard]:
    """The places of the files of tars. Many tars are shared out to processes.

    A process reads some 15,000 headers a second, and CC12M has 36 million.
    """
    count = min(os.cpu_count() or 1, len(shards) // _EACH)
    if count < 2:
        return [_index(shard) for shard in shards]
    what, context = "a process that reads tars was ended", multiprocessing.get_context("spawn")
    with explained(what, "start again, or with fewer tars", (BrokenProcessPool,)):
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            return list(pool.map(_index, shards, chunksize=_EACH // 4))


@functools.lru_cache(16)
def _lines(stems: str) -> list[str]:
    return stems.split("\n")


def _index(shard: str) -> Shard:
    """The places of the files of a tar, in its order."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    size, end = os.path.getsize(shard), -1
    with explained(f"{shard} is no whole tar", _COPY), tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= end:
                raise ValueError("a header has a size that is none")
            tar.members, end = [], tar.offset  # else all headers are kept
            _add(found, shard, member, size)
        end = tar.offset
    with open(shard, "rb") as file:
        file.seek(end)
        rest = file.read(_BLOCK)
        # tarfile ends at a damaged header without a word, and at the first end of several tars.
        while len(rest) >= _BLOCK and not rest.strip(b"\0") and (more := file.read(_LARGEST >> 8)):
            rest = more if len(more) >= _BLOCK else more.ljust(_BLOCK, b"\0")
        if len(rest) < _BLOCK or rest.strip(b"\0"):
            raise UserError(f"{shard} is damaged, cut off or several tars in one file: {_COPY}")
    places = [[files.get(kind, (0, -1)) for kind in KINDS] for files in found.values()]
    return Shard(shard, "\n".join(found), np.array(places, np.int64).reshape(-1, len(KINDS), 2))


def _add(
    found: dict[str, dict[str, tuple[int, int]]], shard: str, member: tarfile.TarInfo, size: int
) -> None:
    """Notes a member of a tar of `size` bytes; raises a UserError for one that cannot be."""
    name = inside(member.name, shard)
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise UserError(f"{shard}: {name} is a link, a device or a sparse file: pack plain files")
    folder, _, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    kind = kind.lower()
    if "\n" in name:
        raise UserError(f"{shard}: the name {name} has a line end: pack it under another")
    if not pictures.counts(file) or kind not in (*_IMAGES, "txt", "json"):
        return
    if member.offset_data + member.size > size:
        raise UserError(f"{shard} is cut off inside of {name}: {_COPY}")
    files = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
    kind = kind if kind in ("txt", "json") else "image"
    if kind in files:
        what = "two images" if kind == "image" else f"two .{kind}"
        raise UserError(f"{shard} has {what} of the stem {stem} ({name}): leave one")
    files[kind] = member.offset_data, member.size


def _content(member: Member, name: str, reason: str, most: int) -> bytes:
    if member.size > most:
        raise Unusable(reason, f"{name} has {member.size:,} bytes, more than {most:,}: {SKIP}")
    try:
        data = member.read()
    except OSError as error:
        raise UserError(f"cannot read {member.shard} ({error.strerror}): mend the access") from None
    if len(data) < member.size:
        raise UserError(f"{member.shard} is shorter than it was at the start: {_COPY}")
    return data
