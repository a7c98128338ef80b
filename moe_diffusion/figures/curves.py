"""Curves: the loss over steps, a metric over guidance, and quality over constant thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion import reading
from moe_diffusion.errors import UserError, shown
from moe_diffusion.figures.canvas import (
    BLUE,
    GREY,
    PALE_BLUE,
    RED,
    label_some,
    make_plain,
    new_figure,
)


def training_picture(columns: Mapping[str, Mapping[int, float]]) -> Image.Image:
    """The loss over the steps, raw and as a running mean, and in small panels what else is known.

    These are the learning rate, the load of the busiest and of the idlest expert (1 = the average),
    and the metrics of evaluations.

    Args:
      columns: as `read_metrics` returns them.
    """
    panels = _panels(columns)
    rows = -(-len(panels) // 3)
    figure, draw = new_figure(8, 4 + 1.9 * rows)
    grid = figure.add_gridspec(1 + rows, 6, height_ratios=[4, *[1.7] * rows])
    axes = figure.add_subplot(grid[0, :])
    steps = np.array(sorted(columns["loss"]))
    values = np.array([columns["loss"][step] for step in steps], np.float64)
    span, middle, mean = _running_mean(steps, values)
    axes.plot(steps, values, color=PALE_BLUE if span > 1 else BLUE, linewidth=1)
    if span > 1:
        axes.plot(middle, mean, color=BLUE, linewidth=1.6)
        axes.legend(["loss", f"mean of {span} logged values"], frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    make_plain(axes)
    for number, (title, curves) in enumerate(panels):
        row, column = divmod(number, 3)
        few = len(panels) - 3 * row  # the last row has one, two or three panels
        width = 6 // min(few, 3)
        panel = figure.add_subplot(grid[1 + row, column * width : (column + 1) * width])
        for (name, found), colour in zip(curves.items(), (BLUE, RED), strict=False):
            place = np.array(sorted(found))
            marker = "o" if len(place) < 12 else None
            lines = {"color": colour, "linewidth": 1.2, "marker": marker, "markersize": 3}
            panel.plot(place, [found[step] for step in place], label=name, **lines)
        if len(curves) > 1:
            panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
            panel.legend(frameon=False, fontsize=7)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(axes.get_xlim())
        panel.tick_params(labelsize=7)
        panel.yaxis.get_offset_text().set_fontsize(7)
        panel.locator_params(nbins=5)
        panel.ticklabel_format(axis="y", scilimits=(-2, 5))
        make_plain(panel)
    return draw()


def _panels(
    columns: Mapping[str, Mapping[int, float]],
) -> list[tuple[str, dict[str, Mapping[int, float]]]]:
    """(title, name -> curve) of the small panels."""
    panels = []
    if "learning_rate" in columns:
        panels.append(("learning rate", {"learning rate": columns["learning_rate"]}))
    load = {
        text: columns[name]
        for name, text in (("load_max", "busiest"), ("load_min", "idlest"))
        if name in columns
    }
    if load:
        panels.append(("load of experts (1 = average)", load))
    judged = [name for name in columns if name.startswith("eval/")]
    return panels + [(name.removeprefix("eval/"), {name: columns[name]}) for name in judged]


def _running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Window (a fortieth of all values), steps, and means; centred, so that they do not lag."""
    span = max(1, len(values) // 40)
    mean = np.convolve(values, np.ones(span) / span, mode="valid")
    return span, steps[(span - 1) // 2 :][: len(mean)], mean


def read_losses(path: Path) -> dict[int, float]:
    """Step -> loss, of a metrics.jsonl; raises what `read_metrics` raises."""
    return read_metrics(path)["loss"]


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Name -> {step: value} of the numbers of a metrics.jsonl; lines without a step are left out.

    If a resumed run wrote a step again, the later line counts. A last line that is cut off in the
    middle (the run was killed) is passed over.

    Raises:
      UserError: the file is not there, a line before the last is not JSON, or no line holds a loss.
    """
    columns: dict[str, dict[int, float]] = {}
    broken = None
    for number, line in reading.lines(path, "metrics"):
        if broken is not None:
            raise UserError(f"line {broken[0]} of {path} is not JSON: {shown(broken[1])}")
        record = reading.table_of(line)
        if record is None:
            broken = number, line  # the last line may be cut off
        elif type(step := record.get("step")) is int:
            for name, value in record.items():
                if type(value) in (int, float) and name != "step":
                    columns.setdefault(name, {})[step] = float(value)
    if "loss" not in columns:
        raise UserError(f"no line of {path} holds a step and a loss")
    return columns


def comparison_picture(
    curves: Mapping[str, Mapping[int, float]], metric: str, title: str, after: int | None = None
) -> Image.Image:
    """One curve for each run over the steps of training.

    Args:
      curves: label of a run -> {step: value}. With more than 40 values, a running mean is drawn.
      metric: name of the values.
      after: the first step of a second panel, which shows the later steps alone, enlarged
        (Dense2MoE, 2510.09094, Figure 5); None for none.
    """
    whole = after is None
    figure, draw = new_figure(7 if whole else 11, 4.2)
    left, *others = figure.subplots(1, 1 if whole else 2, squeeze=False)[0]
    for label, values in curves.items():
        steps = np.array(sorted(values))
        _, middle, mean = _running_mean(steps, np.array([values[step] for step in steps]))
        marker = "o" if len(mean) < 12 else None
        for axes, first in ((left, -1), *((axes, after) for axes in others)):
            late = middle >= first
            axes.plot(middle[late], mean[late], marker=marker, markersize=4, label=label)
    for axes in (left, *others):
        axes.set_xlabel("step")
        make_plain(axes)
    left.set_ylabel(metric)
    left.set_title(title, fontsize=10, wrap=True)
    left.legend(frameon=False, fontsize=8)
    for axes in others:
        axes.set_title(f"from step {after:,} on", fontsize=10)
    return draw()


def sweep_picture(results: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The first metric of each result over its guidance scale, with one line for each average.

    Args:
      results: as `evaluation.evaluator.evaluate` yields them; they differ in "cfg" and "ema". The
        lowest value is written beside its point.
    """
    metric = next(iter(results[0]["metrics"]))
    figure, draw = new_figure(6, 4)
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
    axes.margins(y=0.15)
    make_plain(axes)
    return draw()


def threshold_picture(rows: Sequence[Mapping[str, Any]], target: float) -> Image.Image:
    """C_infer over constant thresholds and, if the rows are judged, the first metric over C_infer.

    The second is Figure 7 of 2503.14487: the blue points are constant thresholds, the red one is
    dynamic.

    Args:
      rows: as `evaluation.capacity_search.search` returns them.
      target: experts per token in training (C), drawn as a dotted line.
    """
    metric = next(iter(rows[0]["metrics"]), None)
    figure, draw = new_figure(10 if metric else 6, 4)
    left, *others = figure.subplots(1, 2 if metric else 1, squeeze=False).flat
    constant = [row for row in rows if row["threshold"] != "dynamic"]
    constant.sort(key=lambda row: row["threshold"])
    dynamic = [row for row in rows if row["threshold"] == "dynamic"]
    names = [f"{row['threshold']:g}" for row in constant]
    left.plot([row["c_infer_avg"] for row in constant], "o-", color=BLUE, label="constant")
    label_some(left.set_xticks, names)
    left.axhline(target, color=GREY, linestyle=":", linewidth=1, label="C of training")
    for row in dynamic:
        left.axhline(row["c_infer_avg"], color=RED, linestyle="--", linewidth=1, label="dynamic")
    left.set_xlabel("threshold")
    left.set_ylabel("C_infer, experts per token")
    left.legend(frameon=False)
    make_plain(left, grid="y")
    for right in others:
        for some, colour in ((constant, BLUE), (dynamic, RED)):
            points = [(row["c_infer_avg"], row["metrics"][metric]) for row in some]
            right.plot(*zip(*points, strict=True), "o", color=colour, zorder=3)
        path = sorted((row["c_infer_avg"], row["metrics"][metric]) for row in constant)
        right.plot(*zip(*path, strict=True), color=PALE_BLUE)
        for name, row in [*zip(names, constant, strict=True), *(("dynamic", d) for d in dynamic)]:
            place = row["c_infer_avg"], row["metrics"][metric]
            right.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7)
        right.axvline(target, color=GREY, linestyle=":", linewidth=1)
        right.set_xlabel("C_infer, experts per token")
        right.set_ylabel(metric)
        make_plain(right)
    return draw()
