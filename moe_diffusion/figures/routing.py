"""A picture of routing: C_infer (experts per token) over layers, times and classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.figures.canvas import BLUE, RED, label_some, make_plain, new_figure


def routing_picture(stats: Mapping[str, Any]) -> Image.Image:
    """A heat map of C_infer, layer x time, and below it bars by class if there are any.

    Args:
      stats: as `RoutingObserver.stats` of `evaluation/routing_stats.py` returns it.
    """
    per_class = stats.get("per_class")
    figure, draw = new_figure(8, 6.5 if per_class else 4)
    above, *others = figure.subplots(
        2 if per_class else 1, 1, height_ratios=[3, 2] if per_class else None, squeeze=False
    ).flat
    grid = np.asarray(stats["per_layer_and_time"])
    heat = above.imshow(grid, aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(heat, ax=above, label="experts per token")
    label_some(above.set_yticks, [str(block) for block in stats["blocks"]])
    label_some(above.set_xticks, [f"{t:g}" for t in np.round(stats["times"], 3)])
    above.set_xlabel("time seen by the network")
    above.set_ylabel("block")
    above.set_title(f"C_infer, on average {stats['c_infer_avg']:.3f}")
    for below in others:
        names = sorted(per_class, key=per_class.get)
        below.bar(range(len(names)), [per_class[name] for name in names], color=BLUE)
        below.axhline(stats["c_infer_avg"], color=RED, linewidth=1)
        label_some(below.set_xticks, names)
        below.set_xlabel("class")
        below.set_ylabel("experts per token")
        make_plain(below, grid="y")
    return draw()
