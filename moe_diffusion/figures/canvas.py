"""Helpers that all pictures made with matplotlib share."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE_BLUE, RED, GREY, GRID = "#24507f", "#b9c9dd", "#b3472e", "#808080", "#e6e6e6"


def new_figure(width: float, height: float) -> tuple[Figure, Callable[[], Image.Image]]:
    """Makes a figure, `width` x `height` inches, and a function without arguments that draws it.

    The figure needs no display. It is freed like any object, unlike those that pyplot keeps.
    """
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")

    def draw() -> Image.Image:
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():  # a font may lack a letter of a label
            warnings.simplefilter("ignore")
            canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    return figure, draw


def _import_matplotlib() -> None:
    """Imports it, which takes a second, so only functions that draw do.

    With an MPLBACKEND that it does not know, as a notebook or a login script may leave it,
    matplotlib refuses to be imported. These pictures need no backend, so it is set afterwards.
    """
    if "matplotlib" in sys.modules:
        return
    inherited = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if inherited:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = inherited
    finally:
        if inherited is not None:
            os.environ["MPLBACKEND"] = inherited


def make_plain(axes: Axes, grid: str = "both") -> None:
    """Draws a pale grid behind the curves (`grid`: "x", "y" or "both") and no frame."""
    axes.grid(color=GRID, linewidth=0.8, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_some(set_ticks: Callable, labels: Sequence[str], most: int = 12) -> None:
    """Puts at most `most` of the labels, evenly spread, at positions 0, 1, 2, ..."""
    every = -(-len(labels) // most)
    set_ticks(range(0, len(labels), every), labels=labels[::every])
