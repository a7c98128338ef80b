"""Pictures of blocks and of chosen layers of experts: Figures 3 and 6 of Dense2MoE (2510.09094).

All functions take `stats` as `RoutingObserver.stats` of `evaluation/routing_stats.py` returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from moe_diffusion.figures.canvas import label_some, make_plain, new_figure
from moe_diffusion.figures.routing import NETWORK_TIME, kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Stats = Mapping[str, Any]
_MOST_NAMED = 12  # lines that a legend names
_MOST_ROWS = 25  # names beside the rows of a heat map
_LONGEST = 24  # letters of a name


def blocks_picture(stats: Stats) -> Image.Image:
    """How much every block changes its input: a line for each class, one for each time.

    The mean squared difference of output and input, on a logarithmic scale; black is the average.
    Dense2MoE (2510.09094), Figure 3.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    names, mean = list(map(str, stats["layers"])), stats["block_mse"]
    classes = _conditional(stats.get("block_mse_by_class", {}))
    several = len(classes) > 1
    wide = min(max(3.6, 0.22 * len(names)), 9)
    figure, draw = new_figure((2 if several else 1) * wide + 1.6, 4.2)
    *left, right = figure.subplots(1, 2 if several else 1, sharey=True, squeeze=False)[0]
    few = len(classes) <= _MOST_NAMED
    ramp = colormaps["tab20" if few else "turbo"]
    for axes in left:
        for place, (name, values) in enumerate(classes.items()):
            colour = ramp(place if few else place / len(classes))
            _line(axes, values, color=colour, linewidth=1, label=_short(name))
        _line(axes, mean, color="black", linewidth=2, label="average")
        axes.set_title(f"by {kind_of(stats)}", fontsize=10)
        if few:
            entries = axes.get_legend_handles_labels()
            place = {"loc": "outside lower center", "ncols": int(1.7 * wide)}
            figure.legend(*entries, frameon=False, fontsize=8, **place)
    times = stats["times"]
    span = Normalize(min(times), max(max(times), min(times) + 1e-6))
    for time, values in zip(times, stats["block_mse_by_time"], strict=True):
        _line(right, values, color=colormaps["viridis"](span(time)), linewidth=1)
    _line(right, mean, color="black", linewidth=2)
    right.set_title("by time", fontsize=10)
    figure.colorbar(_scale("viridis", span), ax=right, label=NETWORK_TIME)
    for axes in (*left, right):
        axes.set_yscale("log")
        axes.set_xlabel("block")
        label_some(axes.set_xticks, names, most=max(4, int(2.2 * wide)))
        make_plain(axes)
    (*left, right)[0].set_ylabel("mean squared change")
    figure.suptitle("How much a block changes its input (black: the average)")
    return draw()


def groups_picture(stats: Stats) -> Image.Image:
    """Which blocks of each group samples pass: by class above, by time below.

    A group is one of Dense2MoE's Mixture of Blocks (2510.09094, section 3.1). The cells are the
    share of samples that pass a block; a row sums to the blocks that a sample passes.
    """
    groups = stats["groups"]
    classes = len(_conditional(next(iter(groups.values())).get("share_by_class", {})))
    rows = [("share_by_class", kind_of(stats))] * (classes > 1) + [("share_by_time", "time")]
    heights = [min(max(1.6, 0.16 * n), 6) for n in [classes] * (classes > 1) + [12]]
    sizes = [len(group["blocks"]) for group in groups.values()]
    width = sum(max(1.5, 0.36 * size) for size in sizes) + 2.6
    figure, draw = new_figure(max(width, 6), sum(heights) + 1.3)
    grid = figure.subplots(
        len(rows),
        len(groups),
        squeeze=False,
        sharey="row",
        height_ratios=heights,
        width_ratios=sizes,
    )
    for place, (key, label) in enumerate(rows):
        row = grid[place]
        for axes, (name, group) in zip(row, groups.items(), strict=True):
            found = group[key]
            named = _conditional(found) if isinstance(found, Mapping) else None
            values = np.asarray(found if named is None else list(named.values()))
            heat = axes.imshow(values, "Blues", aspect="auto", vmin=0, vmax=1, interpolation=None)
            label_some(axes.set_xticks, list(map(str, group["blocks"])))
            if not place:
                axes.set_title(f"group {name}", fontsize=10)
            texts = [f"{t:.3g}" for t in stats["times"]] if named is None else map(_short, named)
            label_some(axes.set_yticks, list(texts), most=_MOST_ROWS if named else 8)
        row[0].set_ylabel(NETWORK_TIME if label == "time" else label)
    for axes in grid[-1]:
        axes.set_xlabel("block")
    figure.colorbar(heat, ax=grid, label="share of samples that pass the block", aspect=40)
    figure.suptitle("Blocks of each group that samples pass")
    return draw()


def selection_picture(stats: Stats) -> Image.Image:
    """How often every expert is chosen: by image, sorted by class, by time and by token.

    A row of panels for each layer of `looked_into`. White lines separate classes. Tokens count from
    the first of a sample: in a layer of text and image, the text's come first. Dense2MoE
    (2510.09094), Figure 6.
    """
    layers, experts = stats["looked_into"], stats["num_experts"]
    shown = stats.get("conditional", stats)
    names = stats["class_of_image"]
    known = {name: place for place, name in enumerate(stats.get("per_class", {}))}
    order = np.argsort([known[name] for name in names], kind="stable") if names else None
    wide = min(max(2.4, 0.16 * experts), 5)
    figure, draw = new_figure(3 * wide + 3.2, 3 * len(layers) + 0.6)
    grid = figure.subplots(len(layers), 3, squeeze=False)
    for row, layer in enumerate(layers):
        by_image = np.asarray(stats["selection_by_image"][row])
        place = stats["blocks"].index(layer)
        by_image = by_image if order is None else by_image[order]
        by_time = np.asarray(shown["selection_by_time"][place])
        by_token = np.asarray(stats["selection_by_token"][row])
        values = by_image, by_time, by_token
        labels = f"image, by {kind_of(stats)}" if names else "image", NETWORK_TIME, "token"
        for axes, heat, label in zip(grid[row], values, labels, strict=True):
            image = axes.imshow(heat, "viridis", aspect="auto", interpolation="nearest", vmin=0)
            figure.colorbar(image, ax=axes, aspect=25)
            axes.set_ylabel(label)
            label_some(axes.set_xticks, list(map(str, range(experts))), most=8)
            axes.set_xlabel("expert")
        if names:
            _separate(grid[row, 0], [names[i] for i in order])
        text = len(by_token) - _image_tokens(stats, layer)
        if 0 < text < len(by_token):
            grid[row, 2].axhline(text - 0.5, color="white", linewidth=1, linestyle="--")
            grid[row, 2].set_ylabel("token (text above, image below)")
        label_some(grid[row, 1].set_yticks, [f"{t:.3g}" for t in shown["times"]], most=8)
        grid[row, 1].set_title(f"block {layer}", fontsize=11)
    figure.suptitle("Share of tokens that choose each expert")
    return draw()


def _image_tokens(stats: Stats, layer: int | str) -> int:
    """How many tokens of a layer, its last ones, are those of the image; 0 if it is not known."""
    tokens = stats.get("tokens", {"blocks": ()})
    return int(np.prod(np.shape(tokens["used"])[-2:])) if layer in tokens["blocks"] else 0


def _separate(axes: Axes, names: Sequence[str]) -> None:
    """White lines between the classes of sorted rows, and the names of the classes beside them."""
    starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    stops = [*starts[1:], len(names)]
    if len(starts) < 2 * _MOST_ROWS and len(starts) < len(names):
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=1)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, stops, strict=True)]
    every = -(-len(starts) // _MOST_ROWS)
    labels = [_short(names[start]) for start in starts[::every]]
    axes.set_yticks(middles[::every], labels=labels, fontsize=7)


def _line(axes: Axes, values: Sequence[float], **options: Any) -> None:
    """A curve over the blocks; what is zero has no logarithm and is left out."""
    values = np.asarray(values, np.float64)
    axes.plot(np.where(values > 0, values, np.nan), marker="o", markersize=2.5, **options)


def _scale(name: str, span: Any) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(span, name)


def _conditional(by_class: Mapping[str, Any]) -> dict[str, Any]:
    """Without the row of "no condition", unless it is the only one."""
    return {name: v for name, v in by_class.items() if name != "null"} or dict(by_class)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
