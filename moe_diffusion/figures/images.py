"""Images of a model as pictures for people: a grid with captions, and single PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moe_diffusion.errors import UserError
from moe_diffusion.writing import whole_file

_TEXT = (60, 60, 60)
_SMALLEST_SIDE = 64  # pixels; smaller images are enlarged to about this


def image_grid(
    images: np.ndarray,
    captions: Sequence | None = None,
    columns: int | None = None,
    scale: int | None = None,
    title: str | None = None,
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
    texts = [] if captions is None else [str(caption) for caption in captions]
    one_per_row = columns > 1 and all(
        len(set(texts[r * columns : (r + 1) * columns])) == 1 for r in range(rows)
    )

    font = ImageFont.load_default(size=min(28, max(14, height // 4)))
    line = sum(font.getmetrics()) + 4
    gap = max(3, width // 20)
    margin = left = top = 4 * gap
    if one_per_row:
        left += math.ceil(max(map(font.getlength, texts))) + 2 * gap
    if title:
        top += line + gap
    step_x = width + gap
    step_y = height + gap + (line if texts and not one_per_row else 0)
    right = left + columns * step_x - gap
    if title:
        right = max(right, left + math.ceil(font.getlength(title)))

    canvas = Image.new("RGB", (right + margin, top + rows * step_y - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((left, margin), title, _TEXT, font, anchor="la")
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


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Writes a PNG, whole or not at all; makes the folder, which may be remote."""
    with whole_file(path) as file:
        image.save(file, format="png")
    return Path(path)


def save_pngs(images: np.ndarray, folder: str | os.PathLike) -> list[Path]:
    """Writes images f32[N, H, W, C] in [-1, 1] as folder/000000.png and on; returns the paths."""
    pixels, _ = to_pixels(np.asarray(images, np.float32))
    return [
        save_png(Image.fromarray(pixel), Path(folder) / f"{i:06}.png")
        for i, pixel in enumerate(pixels)
    ]


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
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
