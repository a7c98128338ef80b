"""Pictures of routing: C_infer over layers, times and classes, and over constant thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_BLUE, _RED, _GRID = "#24507f", "#b3472e", "#e6e6e6"
_MOST_TICKS = 12


def routing_picture(stats: Mapping[str, Any]) -> Image.Image:
    """A heat map of C_infer, layer x time, above bars by class; `stats` of a RoutingObserver."""
    figure, draw = _figure(8, 6.5)
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    grid = np.asarray(stats["per_layer_and_time"])
    heat = above.imshow(grid, aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(heat, ax=above, label="experts per token")
    _label_some(above.set_yticks, [str(block) for block in stats["blocks"]])
    _label_some(above.set_xticks, [f"{t:g}" for t in np.round(stats["times"], 3)])
    above.set_xlabel("time seen by the network")
    above.set_ylabel("block")
    above.set_title(f"C_infer, on average {stats['c_infer_avg']:.3f}")

    names = sorted(stats["per_class"], key=stats["per_class"].get)
    below.bar(range(len(names)), [stats["per_class"][name] for name in names], color=_BLUE)
    below.axhline(stats["c_infer_avg"], color=_RED, linewidth=1)
    _label_some(below.set_xticks, names)
    below.set_xlabel("class")
    below.set_ylabel("experts per token")
    _plain(below)
    return draw()


def threshold_picture(rows: Sequence[Mapping[str, Any]], target: float) -> Image.Image:
    """C_infer (left axis) and the metric, if there is one, over constant thresholds.

    rows: of `capacity_search.search`; the row of the dynamic thresholds becomes dashed lines.
    target: C of training, dotted.
    """
    figure, draw = _figure(7, 4)
    axes = figure.subplots()
    constant = sorted(
        (row for row in rows if row["threshold"] != "dynamic"), key=lambda row: row["threshold"]
    )
    dynamic = [row for row in rows if row["threshold"] == "dynamic"]
    gammas = [row["threshold"] for row in constant]
    axes.plot(gammas, [row["c_infer_avg"] for row in constant], "o-", color=_BLUE)
    axes.axhline(target, color="#808080", linestyle=":", linewidth=1)
    for row in dynamic:
        axes.axhline(row["c_infer_avg"], color=_BLUE, linestyle="--", linewidth=1)
    axes.set_xlabel("threshold (dashed: dynamic, dotted: C of training)")
    axes.set_ylabel("C_infer, experts per token", color=_BLUE)
    _plain(axes)
    if all("class_accuracy" in row for row in rows):
        right = axes.twinx()
        right.plot(gammas, [row["class_accuracy"] for row in constant], "s-", color=_RED)
        for row in dynamic:
            right.axhline(row["class_accuracy"], color=_RED, linestyle="--", linewidth=1)
        right.set_ylabel("class accuracy", color=_RED)
        right.spines["top"].set_visible(False)
    return draw()


def _figure(width: float, height: float):
    """A bare matplotlib figure, which needs no display, and the function that makes it an image."""
    # Imported here: takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")

    def draw() -> Image.Image:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    return figure, draw


def _label_some(set_ticks, labels: Sequence[str]) -> None:
    """At most a dozen of the labels, evenly spread."""
    every = -(-len(labels) // _MOST_TICKS)
    set_ticks(range(0, len(labels), every), labels[::every])


def _plain(axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
