"""The curve of a sweep: a metric over the guidance scale, one line for each average."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.evaluation.figures import save_png


def plot(results: list[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Draws the first metric of results that differ in "cfg" and "ema"; the lowest is marked."""
    # Imported here: takes a second. A bare Figure needs no display and is freed like any object.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = next(iter(results[0]["metrics"]))
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for ema in dict.fromkeys(result["ema"] for result in results):
        points = sorted((r["cfg"], r["metrics"][metric]) for r in results if r["ema"] == ema)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"ema {ema}")
    best = min(results, key=lambda result: result["metrics"][metric])
    axes.annotate(
        f"{best['metrics'][metric]:.4g}",
        (best["cfg"], best["metrics"][metric]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
    )
    axes.set_xlabel("guidance scale (cfg)")
    axes.set_ylabel(metric)
    axes.set_title(f"{best['config']}, step {best['step']}, {best['num_samples']:,} samples")
    axes.legend(frameon=False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
