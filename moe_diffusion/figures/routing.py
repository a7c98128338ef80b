"""Pictures of routing: which experts the tokens of a model use, and how many.

All functions take `stats` as `RoutingObserver.stats` of `evaluation/routing_stats.py` returns it.
Pictures of experts show the conditional evaluations where there are both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from moe_diffusion.figures.canvas import BLUE, GREY, RED, label_some, make_plain, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Stats = Mapping[str, Any]
_MOST_LINES = 16  # experts; more are a heat map
_MOST_NUMBERS = 24  # experts, and layers, whose numbers are written into the cells
_LOAD = "load (1 = as much as the average expert)"
NETWORK_TIME = "time (0 = noise, 1 = image)"


def capacity_picture(stats: Stats) -> Image.Image:
    """A heat map of C_infer, layer x time, and below it bars by class if there are any."""
    per_class = stats.get("per_class")
    figure, draw = new_figure(8, 6.5 if per_class else 4)
    above, *others = figure.subplots(
        2 if per_class else 1, 1, height_ratios=[3, 2] if per_class else None, squeeze=False
    ).flat
    low, high = _range(stats["per_layer_and_time"])
    heat = _heat(above, stats["per_layer_and_time"], cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(heat, ax=above, label="experts per token")
    label_some(above.set_yticks, _texts(stats["blocks"]))
    label_some(above.set_xticks, _texts(stats["times"]))
    above.set_xlabel(NETWORK_TIME)
    above.set_ylabel("block")
    above.set_title(f"experts per token (C_infer), on average {stats['c_infer_avg']:.3f}")
    for below in others:
        names = sorted(per_class, key=per_class.get)
        values = [per_class[name] for name in names]
        below.plot(values, "o", color=BLUE, markersize=6 if len(names) <= 60 else 2)
        below.axhline(stats["c_infer_avg"], color=RED, linewidth=1)
        below.margins(x=0.02)
        if _range(values) != (min(values), max(values)):
            below.set_ylim(_range(values))
        label_some(below.set_xticks, names)
        what = f"{kind_of(stats)}, from easy to hard (null: no condition; red: the average)"
        below.set_xlabel(what)
        below.set_ylabel("experts per token")
        make_plain(below, grid="y")
    return draw()


def experts_picture(stats: Stats) -> Image.Image:
    """The load of every expert in every layer, by number and sorted, and each layer's balance.

    DSMoE (2512.01252), Figure 2, bottom.
    """
    shown, note = _conditional(stats)
    num_experts, blocks = stats["num_experts"], _texts(stats["blocks"])
    load = num_experts * np.asarray(shown["share"]).T  # [experts, blocks]
    order = np.argsort(-load, axis=0, kind="stable")
    width, height = _between(4, 0.55 * len(blocks) + 1, 9), _between(3, 0.2 * num_experts, 9)
    figure, draw = new_figure(2 * width + 1.2, height + 2.6)
    (number, ranked), (busiest, spread) = figure.subplots(2, 2, height_ratios=[height, 1.6])
    for axes, values, title, label in (
        (number, load, "by number", "expert"),
        (ranked, np.take_along_axis(load, order, 0), "sorted in each layer", "rank"),
    ):
        heat = _heat(axes, values, upside_down=True, **_centred(load))
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(label)
        label_some(axes.set_yticks, _texts(range(num_experts)))
        _name_blocks(axes, blocks)
    if num_experts <= _MOST_NUMBERS and len(blocks) <= _MOST_NUMBERS:
        _write_numbers(ranked, order, heat)
        ranked.set_title("sorted in each layer (in the cells: numbers of experts)", fontsize=10)
    figure.colorbar(heat, ax=(number, ranked), label=_LOAD, aspect=40)
    for axes, values, best, title in (
        (busiest, shown["max_over_mean"], 1, "load of the busiest expert (1 = balanced)"),
        (
            spread,
            shown["effective_experts"],
            num_experts,
            f"effective number of experts ({num_experts} = balanced)",
        ),
    ):
        axes.bar(range(len(blocks)), values, color=BLUE, width=0.7)
        axes.axhline(best, color=GREY, linewidth=1, linestyle="--")
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        _name_blocks(axes, blocks)
        make_plain(axes, grid="y")
    figure.suptitle(f"Use of the {num_experts} experts by layer{note}")
    return draw()


def experts_over_time_picture(stats: Stats, blocks: Sequence[int | str]) -> Image.Image:
    """The capacity of every expert over time, a panel for each of the chosen blocks.

    Up to 16 experts are lines, more are a heat map. DiffMoE (2503.14487), Figure 12.
    """
    shown, note = _conditional(stats)
    num_experts = stats["num_experts"]
    capacity = np.asarray(shown["capacity_by_time"])[_places(stats, blocks)]
    lines = num_experts <= _MOST_LINES
    height = 3.6 if lines else _between(3.6, 0.1 * num_experts + 1, 8)
    figure, draw = new_figure(3.4 * len(blocks) + 1.6, height)
    panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    colours = _colours(num_experts)
    for axes, block, values in zip(panels, blocks, capacity, strict=True):
        if lines:
            for expert in range(num_experts):
                axes.plot(
                    shown["times"],
                    values[:, expert],
                    color=colours[expert],
                    label=str(expert),
                    linewidth=1.5,
                    marker="o" if len(shown["times"]) == 1 else None,
                )
            make_plain(axes)
        else:
            heat = _heat(axes, values.T, cmap="viridis", vmin=0, vmax=capacity.max())
            label_some(axes.set_yticks, _texts(range(num_experts)))
            label_some(axes.set_xticks, _texts(shown["times"]), most=6)
        axes.set_title(f"block {block}", fontsize=10)
        axes.set_xlabel(NETWORK_TIME)
    if lines:
        panels[0].set_ylabel("capacity (experts x share of tokens)")
        handles, labels = panels[0].get_legend_handles_labels()
        columns = 1 if num_experts <= 12 else 2
        figure.legend(
            handles, labels, title="expert", loc="outside right", frameon=False, ncols=columns
        )
    else:
        panels[0].set_ylabel("expert")
        figure.colorbar(heat, ax=panels, label="capacity (experts x share of tokens)")
    figure.suptitle(f"Capacity of each expert while an image is drawn{note}")
    return draw()


def experts_by_class_picture(stats: Stats, blocks: Sequence[int | str]) -> Image.Image:
    """How many experts each class uses in every layer, and which, in the chosen blocks.

    The left panel is DSMoE (2512.01252), Figure 2, top.
    """
    names = [name for name in stats["per_class"] if name != "null"]
    num_experts, layers = stats["num_experts"], _texts(stats["blocks"])
    height = _between(3.2, 0.16 * len(names), 11) + 0.8
    narrow, wide = _between(1.6, 0.25 * len(layers), 3), _between(2, 0.1 * num_experts, 3.4)
    widths = [narrow, narrow] + [wide] * len(blocks)
    figure, draw = new_figure(sum(widths) + 0.2 * len(widths) + 3.2, height)
    panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    for axes, key, title in (
        (panels[0], "experts_in_use_by_class", "experts in use"),
        (panels[1], "effective_experts_by_class", "effective number"),
    ):
        values = [stats[key][name] for name in names]
        heat = _heat(axes, values, upside_down=True, cmap="viridis", vmin=0, vmax=num_experts)
        _name_blocks(axes, layers, most=6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
    figure.colorbar(heat, ax=panels[:2], label="experts", aspect=40)
    load = num_experts * np.asarray([stats["share_by_class"][name] for name in names])
    load = load[:, _places(stats, blocks)]
    for i, block in enumerate(blocks):
        axes = panels[2 + i]
        heat = _heat(axes, load[:, i], upside_down=True, **_centred(load))
        label_some(axes.set_xticks, _texts(range(num_experts)), most=6)
        axes.set_title(f"block {block}", fontsize=10)
        axes.set_xlabel("expert")
    figure.colorbar(heat, ax=panels[2:], label=_LOAD, aspect=40)
    panels[0].set_ylabel(kind_of(stats))
    label_some(panels[0].set_yticks, names, most=25)
    figure.suptitle(f"Experts by {kind_of(stats)}: how many (left), and which (right)")
    return draw()


def tokens_picture(
    stats: Stats, blocks: Sequence[int | str], images: np.ndarray, captions: Sequence[str] | None
) -> Image.Image:
    """The drawn images, and beside them which expert has the largest weight in each token.

    Where tokens use different numbers of experts, a second row of maps shows how many.

    Args:
      images: u8[N, H, W] or u8[N, H, W, 3], the first that the observer remembers.
      captions: of the images.
    """
    tokens, num_experts = stats["tokens"], stats["num_experts"]
    places, times = _places(tokens, blocks), tokens["times"]
    strongest = np.asarray(tokens["strongest"])[:, places]  # [images, blocks, times, rows, columns]
    used = np.asarray(tokens["used"])[:, places]
    varies = int(used.min() != used.max())
    kinds, columns = 1 + varies, len(blocks) * len(times)
    images = images[: len(strongest)]
    figure, draw = new_figure(1.1 * (columns + 1) + 2.2, 1.12 * kinds * len(images) + 1.1)
    grid = figure.subplots(
        kinds * len(images), columns + 1, squeeze=False, subplot_kw={"xticks": [], "yticks": []}
    )
    experts, amounts = _discrete(_colours(num_experts)), _discrete(_ramp(used.max() + 1, "viridis"))
    for i, pixels in enumerate(images):
        rows = grid[kinds * i : kinds * (i + 1)]
        rows[0, 0].imshow(pixels, cmap="gray", vmin=0, vmax=255)
        if captions:
            rows[0, 0].set_ylabel(captions[i], rotation=0, ha="right", va="center")
        for axes in rows[1:, 0]:
            axes.axis("off")
        for column in range(columns):
            layer, time = divmod(column, len(times))
            heat = rows[0, column + 1].imshow(strongest[i, layer, time], **experts)
            if varies:
                count = rows[1, column + 1].imshow(used[i, layer, time], **amounts)
    grid[0, 0].set_title("image", fontsize=9)
    for column in range(columns):
        layer, time = divmod(column, len(times))
        text = f"block {blocks[layer]}\ntime {times[time]:.3g}"
        grid[0, column + 1].set_title(text, fontsize=9)
    narrow = {"ax": grid[:, 1:], "fraction": 0.02, "aspect": 30, "pad": 0.015}
    if varies:
        bar = figure.colorbar(count, label="experts used by a token", **narrow)
        label_some(bar.set_ticks, _texts(range(used.max() + 1)))
    bar = figure.colorbar(heat, label="expert with the largest weight (white: none)", **narrow)
    label_some(bar.set_ticks, _texts(range(num_experts)), most=24)
    title = "Which expert each token of the image uses most"
    figure.suptitle(title + " (above), and how many it uses (below)" * varies)
    return draw()


def kind_of(stats: Stats) -> str:
    """What the classes of `stats` are, for people."""
    return {"prompt": "category of prompts"}.get(stats.get("class_kind"), "class")


def _range(values: Any) -> tuple[float, float]:
    """The range of colours or of an axis: that of the values, but wide where they are all alike."""
    low, high = float(np.min(values)), float(np.max(values))
    return (low, high) if high - low > 1e-4 else (low - 0.5, high + 0.5)


def _conditional(stats: Stats) -> tuple[Stats, str]:
    """The tables of the conditional evaluations if there are others, and a note for the title."""
    if "conditional" in stats:
        return stats["conditional"], " (conditional evaluations)"
    return stats, ""


def _places(stats: Stats, blocks: Sequence[int | str]) -> list[int]:
    """Where the chosen layers stand on an axis of layers; stats: all, or those of tokens."""
    return [stats["blocks"].index(block) for block in blocks]


def _texts(values: Sequence[Any]) -> list[str]:
    return [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]


def _name_blocks(axes: Axes, blocks: Sequence[str], most: int = 12) -> None:
    """Names below the layers; fewer if they have the names of streams, which are long."""
    label_some(axes.set_xticks, blocks, most // 2 if any(" " in name for name in blocks) else most)


def _between(low: float, value: float, high: float) -> float:
    return min(max(low, value), high)


def _heat(axes: Axes, values: Any, upside_down: bool = False, **options: Any) -> AxesImage:
    """A heat map of [rows, columns]; upside_down puts row 0 above."""
    origin = "upper" if upside_down else "lower"
    return axes.imshow(
        np.asarray(values), aspect="auto", origin=origin, interpolation="nearest", **options
    )


def _centred(load: np.ndarray) -> dict[str, Any]:
    """Colours for loads: white at 1, blue for less, red for more; small differences stay pale."""
    from matplotlib.colors import TwoSlopeNorm

    return {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1, min(0.7, load.min()), max(1.3, load.max()))}


def _write_numbers(axes: Axes, order: np.ndarray, heat: AxesImage) -> None:
    """The number of the expert in each cell of a heat map, order i64[rank, layer]."""
    shade = np.abs(np.asarray(heat.norm(heat.get_array())) - 0.5)
    for place, expert in np.ndenumerate(order):
        colour = "white" if shade[place] > 0.35 else "black"
        axes.text(*place[::-1], str(expert), ha="center", va="center", fontsize=8, color=colour)


def _colours(number: int) -> np.ndarray:
    """f64[number, 4]: colours that differ as much as so many can."""
    from matplotlib import colormaps

    if number <= 10:
        return colormaps["tab10"](np.arange(number))
    if number <= 20:
        return colormaps["tab20"](np.arange(number))
    return _ramp(number, "turbo")


def _ramp(number: int, name: str) -> np.ndarray:
    """f64[number, 4]: colours evenly spaced on a colour map."""
    from matplotlib import colormaps

    return colormaps[name](np.linspace(0, 1, number))


def _discrete(colours: np.ndarray) -> dict[str, Any]:
    """A colour for each of the integers from 0, and white for those below."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    return {"cmap": ListedColormap(colours).with_extremes(under="white"), "norm": steps}
