"""Curves: the loss over steps, a metric over guidance, and quality over constant thresholds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from moe_diffusion.errors import UserError
from moe_diffusion.figures.canvas import (
    BLUE,
    GREY,
    PALE_BLUE,
    RED,
    label_some,
    make_plain,
    new_figure,
)
from moe_diffusion.figures.images import save_png


def loss_curve(jsonl_path: str | os.PathLike, out_path: str | os.PathLike) -> Path:
    """Plots the loss over the steps of a metrics.jsonl, raw and as a running mean.

    Lines without "step" and "loss" are passed over. If a resumed run wrote a step again, the later
    line counts. A last line that is cut off in the middle (the run was killed) is passed over too.

    Raises:
      UserError: the file is not there, another line is not JSON, or no line holds a loss.
    """
    losses = read_losses(epath.Path(jsonl_path))
    steps = np.array(sorted(losses))
    values = np.array([losses[step] for step in steps], np.float64)
    figure, draw = new_figure(7, 4)
    axes = figure.subplots()
    span, middle, mean = _running_mean(steps, values)
    axes.plot(steps, values, color=PALE_BLUE if span > 1 else BLUE, linewidth=1)
    if span > 1:
        axes.plot(middle, mean, color=BLUE, linewidth=1.6)
        axes.legend(["loss", f"mean of {span} logged values"], frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    make_plain(axes)
    return save_png(draw(), out_path)


def _running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Window (a fortieth of all values), steps, and means; centred, so that they do not lag."""
    span = max(1, len(values) // 40)
    mean = np.convolve(values, np.ones(span) / span, mode="valid")
    return span, steps[(span - 1) // 2 :][: len(mean)], mean


def read_losses(path: Path) -> dict[int, float]:
    """Step -> loss, of a metrics.jsonl; raises what `loss_curve` raises."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror}") from None
    losses = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"line {number} of {path} is not JSON: {line[:80]!r}") from None
        if isinstance(record, dict) and None not in (record.get("step"), record.get("loss")):
            losses[int(record["step"])] = float(record["loss"])
    if not losses:
        raise UserError(f"no line of {path} holds a step and a loss")
    return losses


def comparison_picture(
    curves: Mapping[str, Mapping[int, float]], metric: str, title: str
) -> Image.Image:
    """One curve for each run over the steps of training.

    Args:
      curves: label of a run -> {step: value}. With more than 40 values, a running mean is drawn.
      metric: name of the values.
    """
    figure, draw = new_figure(7, 4.2)
    axes = figure.subplots()
    for label, values in curves.items():
        steps = np.array(sorted(values))
        _, middle, mean = _running_mean(steps, np.array([values[step] for step in steps]))
        axes.plot(middle, mean, marker="o" if len(mean) < 12 else None, markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.set_title(title, fontsize=10, wrap=True)
    axes.legend(frameon=False, fontsize=8)
    make_plain(axes)
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
