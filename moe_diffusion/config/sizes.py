"""The size of pictures in pixels, as changes of a config. `models` and others ask `input_shape`."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError, shown

Size = int | str | Sequence[int]
_LATENTS = 8  # pixels a side of a latent, of all autoencoders that bare files are known of
_MOST = 1 << 14  # pixels; no machine draws more
_IMAGES = (1, 3)  # channels of a model that makes images without an autoencoder
# Keys of what a model is given: the same weights serve any size of image and any length of text.
SIZES = ("model.image_size", "model.image_width", "model.flux.text_tokens", "model.flux.text_dtype")
SIZES += ("model.dit_t2i.text_tokens", "model.dit_t2i.text_dtype")


def parse_size(size: Size, asked_by: str = "size") -> tuple[int, int]:
    """(height, width) of "1024" or "768x1024" (height first), of a number, or of two.

    Args:
      asked_by: what names the size, like "--size". The error begins with it.

    Raises:
      UserError: it is nothing of that.
    """
    try:
        if isinstance(size, str):
            sides = [int(part) for part in size.lower().split("x")]
        else:
            sides = [operator.index(part) for part in (size if np.ndim(size) else [size])]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or not all(0 < side <= _MOST for side in sides):
        raise UserError(
            f"{asked_by} {shown(size)} is no size of up to {_MOST} pixels a side: write 1024, or "
            "768x1024, the height first"
        )
    return sides[0], sides[-1]


def pixels_per_input(config: ConfigDict, factor: int | None = None) -> int:
    """Pixels a side of what one position of the model's input shows: 1, or those of a latent.

    Args:
      factor: of the autoencoder; None if there is none. Then a model of other than 1 or 3 channels
        is taken for one of latents of the usual 8 x 8 pixels.
    """
    return factor or (1 if config.model.channels in _IMAGES else _LATENTS)


def size_changes(
    config: ConfigDict, size: Size, factor: int | None = None, asked_by: str = "size"
) -> list[str]:
    """The overrides that give pictures of a model another size; for `config.load` and `settle`.

    Args:
      config: of the model.
      size: see `parse_size`.
      factor: see `pixels_per_input`.

    Raises:
      UserError: it is no size, or a side does not consist of whole patches; the message names the
        nearest size that does.
    """
    sides = parse_size(size, asked_by)
    unit = pixels_per_input(config, factor)
    multiple = unit * config.model.patch_size
    if any(side % multiple for side in sides):
        nearest = [max(1, round(side / multiple)) * multiple for side in sides]
        asked, near = (f"{a}x{b}" if sides[0] != sides[1] else str(a) for a, b in (sides, nearest))
        raise UserError(
            f"{asked_by} {asked}: this model draws multiples of {multiple} pixels; the nearest is "
            f"{near}"
        )
    height, width = (side // unit for side in sides)
    return [f"model.image_size={height}", f"model.image_width={width if width != height else 0}"]
