"""Pictures inside of a page, as data URIs that fit a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.errors import first_line
from moe_diffusion.reporting.runs import Run

ALL_GRIDS = 2_000_000  # bytes of all sample grids of a page
MOST_GRIDS = 24  # of a run
_WIDEST = 1200  # pixels; a page shows no more
_QUALITIES = (88, 75, 60, 45)


def data_uri(image: Image.Image, most: int) -> str:
    """The picture as PNG if that has at most `most` bytes, else as a JPEG that has, if need be
    a smaller one."""
    if max(image.size) <= _WIDEST and len(data := _encoded(image, "PNG", optimize=True)) <= most:
        return _uri("png", data)
    image = image.convert("RGB")
    image.thumbnail((_WIDEST, _WIDEST))
    while True:
        for quality in _QUALITIES:
            data = _encoded(image, "JPEG", quality=quality)
            if len(data) <= most or max(image.size) <= 64:
                return _uri("jpeg", data)
        image = image.resize([max(1, round(0.7 * side)) for side in image.size])


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bytes_of(values: np.ndarray) -> str:
    """u8 values in order as base64."""
    return base64.b64encode(np.ascontiguousarray(values, np.uint8).tobytes()).decode()


def grids(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The sample grids of every run: steps and pictures; at most `MOST_GRIDS`, evenly spread.

    A picture that cannot be read is noted in its run.
    """
    chosen = [_spread(run.samples) for run in runs]
    count = sum(map(len, chosen))
    found = []
    for run, samples in zip(runs, chosen, strict=True):
        steps, uris = [], []
        for step, path in samples.items():
            try:
                with path.open("rb") as file, Image.open(file, formats=("png",)) as image:
                    image.load()
                    uris.append(data_uri(image, ALL_GRIDS // count))
                    steps.append(step)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                run.notes.append(f"{path.name} of samples/ is left out ({first_line(error)})")
        found.append({"steps": steps, "pictures": uris})
    return found


def _spread(samples: Mapping[int, Any]) -> dict[int, Any]:
    steps = list(samples)
    count = min(len(steps), MOST_GRIDS)
    places = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int)) if count else []
    return {steps[place]: samples[steps[place]] for place in places}
