"""Picture files: which of a folder count, and what the pixels of one mean.

Everything that reads pictures reads them here, so that training data and judged images mean the
same. A picture comes upright (as its EXIF data says), in grey or in colour, with 8 bits a channel:

| in the file                        | what is read                                                |
|------------------------------------|-------------------------------------------------------------|
| grey of 16 bits                    | divided by 257 and rounded: 65,535 is white, 257 is 1       |
| transparency of any kind           | the picture on white                                        |
| palette                            | its colours                                                 |
| CMYK, YCbCr, HSV                   | the colours as Pillow converts them, without colour profiles|
| 32-bit integers, floats, Lab       | refused: nothing says which value is black and which white  |
| several frames                     | the first                                                   |
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image

from moe_diffusion.errors import UserError, explained

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What a file may hold, whatever its suffix: not what Pillow hands to another program, like EPS.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What file managers, storage systems and archives put beside pictures; also all that begins with a
# full stop.
_OF_THE_SYSTEM = ("@eadir", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin")
_OF_THE_SYSTEM += ("system volume information", "__pycache__")

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY = ("1", "L", "LA", *_WIDE)
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION = 0x0112  # the EXIF tag; its values 2 to 8 and what undoes them:
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_SHOWN = 5  # names in a message


def by_folder(folder: str | os.PathLike) -> dict[str, list[str]]:
    """Finds the pictures below a folder, and tells on stderr what it leaves out.

    Hidden files and folders and those of the system are left out at any depth, and so are pictures
    that lie in no sub-folder. Links are followed. Every file and every folder counts once, at its
    own place rather than that of a link to it, and a link to a folder that holds the one it lies in
    leads nowhere.

    Returns:
      Name of each sub-folder -> sorted paths of the pictures in it and in its own sub-folders.

    Raises:
      UserError: a folder cannot be read.
    """
    found = _find(folder, deep=True)
    _tell(folder, found.pop(""), "in no sub-folder")
    return found


def directly_in(folder: str | os.PathLike) -> list[str]:
    """The sorted paths of the pictures in a folder, without its sub-folders; as `by_folder`."""
    return _find(folder, deep=False)[""]


def below(folder: str | os.PathLike) -> list[str]:
    """The sorted paths of the pictures in a folder and in its sub-folders; as `by_folder`."""
    return sorted(path for paths in _find(folder, deep=True).values() for path in paths)


def counts(name: str) -> bool:
    """Whether a name of a file or folder is neither hidden nor one of the system."""
    return not name.startswith(".") and name.lower() not in _OF_THE_SYSTEM


def is_picture(name: str) -> bool:
    """Whether a file's name ends like that of a picture."""
    return name.lower().endswith(SUFFIXES)


def printable(name: str) -> str:
    """A name of a file or class with ? for what a terminal or a picture cannot show."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _find(folder: str | os.PathLike, deep: bool) -> dict[str, list[str]]:
    """`by_folder`; the name "" has the pictures that lie directly in the folder."""
    root = os.path.realpath(folder)
    found: dict[str, list[str]] = {"": []}
    hidden: list[str] = []
    twice: list[str] = []
    walked: set[str] = set()  # folders, by their real paths
    linked: set[str] = set()  # files that links lead to, likewise
    folders, links = deque([("", os.fspath(folder))]), deque()
    while folders or links:
        group, path = (folders or links).popleft()
        real = os.path.realpath(path)
        if not os.path.isdir(real):
            place, name = os.path.split(real)
            counted = place in walked and counts(name) and is_picture(name)
            if real in linked or (counted and os.path.exists(real)):
                twice.append(path)
            else:
                linked.add(real)
                found[group].append(path)
            continue
        if real in walked or (real != root and root.startswith(os.path.join(real, ""))):
            twice.append(path)
            continue
        walked.add(real)
        found.setdefault(group, [])
        for entry in _entries(path):
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if not (is_folder and deep or not is_folder and is_picture(entry.name)):
                continue
            if not counts(entry.name):
                hidden.append(entry.path)
            elif is_folder or is_link:
                own = group or (entry.name if is_folder else "")
                (links if is_link else folders).append((own, entry.path))
            elif linked and os.path.join(real, entry.name) in linked:
                twice.append(entry.path)
            else:
                found[group].append(entry.path)
    _tell(folder, hidden, "hidden or of the system")
    _tell(folder, twice, "links to what counts already")
    return {group: sorted(paths) for group, paths in found.items()}


def _entries(folder: str) -> list[os.DirEntry]:
    with (
        explained(f"the folder {folder} cannot be read", "allow it or move it away", (OSError,)),
        os.scandir(folder) as entries,
    ):
        return sorted(entries, key=lambda entry: entry.name)


def _tell(folder: str | os.PathLike, paths: Sequence[str], why: str) -> None:
    if paths:
        names = [printable(os.path.relpath(path, folder)) for path in paths[:_SHOWN]]
        names += [f"{len(paths) - _SHOWN:,} more"] if len(paths) > _SHOWN else []
        print(f"left out of {folder}: {', '.join(names)} ({why})", file=sys.stderr, flush=True)


def read(file: str | os.PathLike | bytes, name: str, remedy: str) -> Image.Image:
    """Reads a picture; see the top of this file.

    Args:
      file: its path, or its content.
      name: what to call it in messages.
      remedy: what a user can do about a broken one.

    Returns:
      An image of mode "L" or "RGB".

    Raises:
      UserError: it is broken, too large, no regular file, or has pixels without a meaning.
    """
    with _opened(file, name, remedy) as image:
        image.load()
        return _decoded(image)


def header(file: str | os.PathLike | bytes, remedy: str, name: str = "") -> tuple[int, int, int]:
    """(height, width, channels 1 or 3) of a picture, without its pixels.

    Args:
      name: what to call it in messages, if that is not its path.

    An EXIF block behind the pixels of a PNG is not seen, so whoever reads the picture compares.

    Raises:
      UserError: as `read`, as far as the header tells.
    """
    with _opened(file, name or os.fspath(file), remedy) as image:
        late = image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
        sideways = not late and _orientation(image) in _SIDEWAYS
        width, height = image.size[::-1] if sideways else image.size
        return height, width, 1 if image.mode in _GREY else 3


def size_of(
    picture: str | os.PathLike | bytes | np.ndarray, name: str, remedy: str, skip: bool = False
) -> tuple[int, int] | None:
    """(height, width) of a picture in a file, in bytes, or as an array; see `header`.

    Args:
      skip: whether the size of a broken picture is None rather than an error.

    Raises:
      UserError: see `header`.
    """
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    try:
        return header(picture, remedy, name)[:2]
    except UserError:
        if skip:
            return None
        raise


def from_array(pixels: np.ndarray, name: str, remedy: str) -> Image.Image:
    """The image of an array [H, W] or [H, W, 1, 3 or 4], u8 or (of one channel) u16; see `read`."""
    with explained(f"{name} cannot be read as an image", remedy):
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
        return _decoded(_checked(Image.fromarray(pixels)))


@contextlib.contextmanager
def _opened(file: str | os.PathLike | bytes, name: str, remedy: str) -> Iterator[Image.Image]:
    # Pillow raises many kinds: OSError, SyntaxError, ValueError, DecompressionBombError, ...
    with explained(f"{name} cannot be read as an image", remedy):
        if isinstance(file, bytes):
            source: IO | str | os.PathLike = io.BytesIO(file)
        else:
            source = file
            if not stat.S_ISREG(os.stat(file).st_mode):  # reading a pipe would wait forever
                raise ValueError("it is no regular file")
        with Image.open(source, formats=_FORMATS) as image:
            yield _checked(image)


def _checked(image: Image.Image) -> Image.Image:
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"no value of its mode {image.mode} means white; 8 or 16 bits are known")
    return image


def _decoded(image: Image.Image) -> Image.Image:
    """A loaded image, upright and in mode "L" or "RGB"."""
    orientation, mode = _orientation(image), "L" if image.mode in _GREY else "RGB"
    if image.mode in _WIDE:
        image = _narrowed(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _narrowed(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, with alpha where one value stands for "transparent"."""
    wide = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    return grey


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. EXIF data that cannot be read says nothing."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds; the pixels are whole
        return 1
