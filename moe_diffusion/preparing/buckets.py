"""Which of several sizes each picture is prepared in: the one whose aspect ratio is nearest."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_diffusion.config.sizes import parse_size
from moe_diffusion.errors import UserError, explained

FILE = "buckets.npz"  # the bucket of every record; it belongs to an unfinished folder
_BLOCK = 4096  # pictures whose sizes are asked for at once
Size = tuple[int, int]  # (height, width)


def parse_sizes(text: str, factor: int, patch: int) -> list[Size]:
    """The sizes of "256x256,192x320" in pixels, height x width.

    Args:
      factor: pixels per latent along a side.
      patch: latents per patch along a side, of the models that shall train on them.

    Raises:
      UserError: one is no size or has no whole patches, or two have the same aspect ratio.
    """
    sizes = [parse_size(part, "--sizes") for part in text.split(",")]
    if patch < 1:
        raise UserError("--patch-size must be at least 1")
    for height, width in sizes:
        if height % (factor * patch) or width % (factor * patch):
            raise UserError(
                f"--sizes {height}x{width} is no multiple of {factor * patch}: {factor} pixels per "
                f"latent, {patch} latents per patch (--patch-size)"
            )
    for (h, w), (other_h, other_w) in itertools.combinations(sizes, 2):
        if h * other_w == w * other_h:
            raise UserError(
                f"--sizes {h}x{w} and {other_h}x{other_w} have the same aspect ratio, so that no "
                "picture would be nearer to one of them: leave one out"
            )
    return sizes


def views(source: Any, sizes: Sequence[Size], name: str) -> list[Any]:
    """The source with images of each size, (height, width) in pixels.

    Raises:
      UserError: the source cannot tell the sizes of its pictures.
    """
    if not hasattr(source, "picture_size"):
        raise UserError(f"{name} has images of one size, so --sizes means nothing: give --size")
    found = []
    for size in sizes:
        view = copy.copy(source)
        view.image_shape = (*size, source.image_shape[2])
        found.append(view)
    return found


def nearest(pictures: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Number of the size with the nearest aspect ratio, i64[N], of pictures i64[N, 2]."""
    height, width = np.log(np.asarray(pictures, np.float64)).T
    ratios = np.log(np.asarray(sizes, np.float64))
    wanted = ratios[:, 0] - ratios[:, 1]
    return np.abs((height - width)[:, None] - wanted).argmin(1)


def assign(source: Any, sizes: Sequence[Size], folder: Path, workers: int) -> None:
    """Reads the size of every picture and writes each one's bucket to `folder`, if not yet there.

    A broken picture belongs to the first bucket, in which the source will say what is wrong.
    """
    path, found = folder / FILE, []
    if path.is_file():
        return
    with (
        tqdm(total=len(source), unit="image", desc="reading sizes") as bar,
        ThreadPoolExecutor(workers) as readers,
    ):
        for start in range(0, len(source), _BLOCK):
            block = range(start, min(start + _BLOCK, len(source)))
            found += [size or sizes[0] for size in readers.map(source.picture_size, block)]
            bar.update(len(block))
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, bucket=nearest(np.array(found), sizes).astype(np.uint16))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def records(folder: Path, count: int, number: int) -> list[np.ndarray]:
    """The numbers of the records of each of `number` buckets, as `assign` wrote them.

    Raises:
      UserError: the file is damaged or of another source.
    """
    path = folder / FILE
    with explained(f"{path} is damaged", "delete the folder and prepare it again"):
        with path.open("rb") as file:  # np.load leaves a damaged file open
            bucket = np.load(file)["bucket"]
        if bucket.shape != (count,) or bucket.dtype != np.uint16 or bucket.max() >= number:
            raise ValueError(f"it does not say the buckets of {count} records")
    return [np.flatnonzero(bucket == k) for k in range(number)]
