"""Images of a model as pictures for people: a grid with captions, a film, and single PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from moe_diffusion.errors import UserError
from moe_diffusion.ornaments import ornament
from moe_diffusion.writing import check_empty, whole_file

_TEXT = (60, 60, 60)
_SMALLEST_SIDE = 64  # pixels; smaller images are enlarged to about this
_WIDEST_CAPTION = 600  # pixels of a caption left of its row
_MOST_PIXELS = 60e6  # of all images of a grid; about 250 MB while it is drawn
_SOFTWARE = "moe_diffusion"  # what a PNG of ours says in its field "Software"


def image_grid(
    images: np.ndarray,
    captions: Sequence | None = None,
    columns: int | None = None,
    scale: int | None = None,
    title: str | None = None,
    heads: Sequence[str] = (),
) -> Image.Image:
    """Lays images side by side on white, with their captions.

    If all images of every row have one caption, it stands once, left of the row. Otherwise each
    image has its caption below.

    Args:
      images: f32[N, H, W, C] in [-1, 1]; values beyond are clipped. One channel is shown in grey
        and three in colour. With another number of channels (latents), the first three are shown,
        or the first of two. Each is stretched to its own range, and the title says so.
      captions: N values that print well, like labels; None for no text.
      columns: images in a row; by default the grid has about as many rows as columns.
      scale: screen pixels per pixel, a whole number; by default small images grow to about 64.
      title: a line of text above the grid.
      heads: texts above the columns.

    Raises:
      UserError: there is no image, an image is not finite, or `captions` is of another length.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or not images.size:
        raise UserError(f"a grid needs images of shape [N, H, W, C], got {images.shape}")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"a grid of {len(images)} images got {len(captions)} captions")
    pixels, note = to_pixels(images)
    title = " ".join(filter(None, [title, note]))
    count = len(pixels)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    scale = scale or max(1, round(_SMALLEST_SIDE / max(images.shape[1:3])))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    texts = [] if captions is None else [" ".join(str(caption).split()) for caption in captions]
    one_per_row = columns > 1 and all(
        len(set(texts[r * columns : (r + 1) * columns])) == 1 for r in range(rows)
    )

    font = ImageFont.load_default(size=min(28, max(14, height // 4)))
    line = sum(font.getmetrics()) + 4
    gap = max(3, width // 20)
    margin = left = top = 4 * gap
    if one_per_row:
        texts = [_shorten(text, font, _WIDEST_CAPTION) for text in texts]
        left += math.ceil(max(map(font.getlength, texts))) + 2 * gap
    if title:
        top += line + gap
    if heads:
        top += line
    step_x = width + gap
    step_y = height + gap + (line if texts and not one_per_row else 0)
    right = left + columns * step_x - gap
    if title:
        right = max(right, left + math.ceil(font.getlength(title)))

    canvas = Image.new("RGB", (right + margin, top + rows * step_y - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((left, margin), title, _TEXT, font, anchor="la")
    for column, text in enumerate(heads):
        draw.text((left + column * step_x + width // 2, top - 4), text, _TEXT, font, anchor="md")
    for i, pixel in enumerate(pixels):
        row, column = divmod(i, columns)
        x, y = left + column * step_x, top + row * step_y
        tile = Image.fromarray(pixel).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (x, y))
        if texts and not one_per_row:
            text = _shorten(texts[i], font, width)
            draw.text((x + width // 2, y + height + 2), text, _TEXT, font, anchor="ma")
        elif one_per_row and column == 0:
            draw.text((left - 2 * gap, y + height // 2), texts[i], _TEXT, font, anchor="rm")
    return canvas


def save_png(
    image: Image.Image, path: str | os.PathLike, text: Mapping[str, object] | None = None
) -> Path:
    """Writes a PNG that says it is ours, whole or not at all; makes the folder.

    Args:
      text: fields that the file carries, like a prompt and a seed; PIL reads them as `image.text`.

    Raises:
      WriteError: it cannot be written.
    """
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    for name, value in (text or {}).items():
        info.add_text(name, str(value))  # PIL writes what is not Latin-1 as UTF-8 (iTXt)
    with whole_file(path) as file:
        image.save(file, format="png", pnginfo=info)
    return Path(path)


def own_name(path: str | os.PathLike) -> Path:
    """The path, or the first of <name>-2, <name>-3, ... that is free or holds a picture of ours.

    For pictures that no flag names: they must not replace what a user put there.
    """
    path, number = Path(os.fspath(path)), 1  # Path of an epath would be a local one
    place = path
    while os.path.lexists(place) and not is_ours(place):
        number += 1
        place = path.with_stem(f"{path.stem}-{number}")
    return place


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a file is a PNG that `save_png` wrote."""
    if not os.path.isfile(path):
        return False
    try:
        with Image.open(path, formats=("png",)) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False


def save_ornament(draw: Callable[[], Image.Image], path: str | os.PathLike) -> Path | None:
    """Draws and saves a picture that no flag names, under `own_name`; returns where.

    If that fails in any way, the user is told in a line and it returns None.
    """
    with ornament(f"the picture {path}"):
        return save_png(draw(), own_name(path))
    return None


def save_pngs(
    images: np.ndarray,
    folder: str | os.PathLike,
    texts: Sequence[Mapping[str, object]] | None = None,
) -> list[Path]:
    """Writes images f32[N, H, W, C] in [-1, 1] as folder/000000.png and on; returns the paths.

    Args:
      texts: the fields that each file carries, see `save_png`.

    Raises:
      UserError: the folder holds other files, or an image cannot be written; then the folder holds
        what it held.
    """
    pixels, _ = to_pixels(np.asarray(images, np.float32))
    check_empty("the folder of images", folder)
    paths: list[Path] = []
    try:
        for i, pixel in enumerate(pixels):
            path = Path(folder) / f"{i:06}.png"
            paths.append(save_png(Image.fromarray(pixel), path, texts and texts[i]))
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def save_gif(frames: Sequence[Image.Image], path: str | os.PathLike, seconds: float) -> Path:
    """Writes an endless film of `seconds`; the last frame stays for two seconds more.

    The frames may differ in size. White fills them up to the largest.

    Raises:
      WriteError: it cannot be written.
    """
    each = max(20, round(1000 * seconds / len(frames)))  # milliseconds; viewers slow down less
    times = [each] * (len(frames) - 1) + [each + 2000]
    size = tuple(max(frame.size[axis] for frame in frames) for axis in range(2))
    sheets = [Image.new("RGB", size, "white") for _ in frames]
    for sheet, frame in zip(sheets, frames, strict=True):
        sheet.paste(frame)
    first, *others = sheets
    with whole_file(path) as file:
        first.save(file, "gif", save_all=True, append_images=others, duration=times, loop=0)
    return Path(path)


def few_enough(count: int, shape: Sequence[int]) -> np.ndarray:
    """i64[at most count]: which of so many images [H, W, C] a grid can show, evenly spread."""
    side = max(_SMALLEST_SIDE, *shape[:2]) * 1.1
    most = max(1, min(count, int(_MOST_PIXELS / side**2)))
    return np.arange(most) * count // most


def to_pixels(images: np.ndarray) -> tuple[np.ndarray, str]:
    """f32[N, H, W, C] -> u8[N, H, W] (grey) or u8[N, H, W, 3], and a note on what is shown."""
    broken = len(images) - int(np.isfinite(images).all((1, 2, 3)).sum())
    if broken:
        raise UserError(f"{broken} of {len(images)} images hold NaN or infinity")
    channels, note = images.shape[-1], ""
    if channels not in (1, 3):
        shown = 3 if channels > 3 else 1
        images = images[..., :shown]
        low, high = images.min((0, 1, 2)), images.max((0, 1, 2))
        images = 2 * (images - low) / np.maximum(high - low, 1e-6) - 1
        note = f"(first {shown} of {channels} channels, rescaled)"
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return (pixels[..., 0] if pixels.shape[-1] == 1 else pixels), note


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its beginning as fits the width in pixels, with an ellipsis."""
    kept = text[: int(width)]  # a letter has a pixel at least; to measure long texts takes long
    if kept == text and font.getlength(text) <= width:
        return text
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1]
    return kept + "…"
