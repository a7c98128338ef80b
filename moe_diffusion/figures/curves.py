"""Curves: the loss over steps, a metric over guidance, and quality over constant thresholds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.errors import UserError
from moe_diffusion.figures.canvas import BLUE, GREY, PALE_BLUE, RED, make_plain, new_figure
from moe_diffusion.figures.images import save_png


def loss_curve(jsonl_path: str | os.PathLike, out_path: str | os.PathLike) -> Path:
    """Plots the loss over the steps of a metrics.jsonl, raw and as a running mean.

    Lines without "step" and "loss" are passed over. If a resumed run wrote a step again, the later
    line counts. A last line that is cut off in the middle (the run was killed) is passed over too.

    Raises:
      UserError: the file is not there, another line is not JSON, or no line holds a loss.
    """
    losses = read_losses(Path(jsonl_path))
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
    """C_infer (left axis) over constant thresholds, and class accuracy (right axis) if it is known.

    Args:
      rows: as `evaluation.capacity_search.search` returns them. The row of the dynamic thresholds
        becomes dashed lines.
      target: experts per token in training (C), drawn as a dotted line.
    """
    figure, draw = new_figure(7, 4)
    axes = figure.subplots()
    constant = sorted(
        (row for row in rows if row["threshold"] != "dynamic"), key=lambda row: row["threshold"]
    )
    dynamic = [row for row in rows if row["threshold"] == "dynamic"]
    gammas = [row["threshold"] for row in constant]
    axes.plot(gammas, [row["c_infer_avg"] for row in constant], "o-", color=BLUE)
    axes.axhline(target, color=GREY, linestyle=":", linewidth=1)
    for row in dynamic:
        axes.axhline(row["c_infer_avg"], color=BLUE, linestyle="--", linewidth=1)
    axes.set_xlabel("threshold (dashed: dynamic, dotted: C of training)")
    axes.set_ylabel("C_infer, experts per token", color=BLUE)
    make_plain(axes, grid="y")
    if all("class_accuracy" in row for row in rows):
        right = axes.twinx()
        right.plot(gammas, [row["class_accuracy"] for row in constant], "s-", color=RED)
        for row in dynamic:
            right.axhline(row["class_accuracy"], color=RED, linestyle="--", linewidth=1)
        right.set_ylabel("class accuracy", color=RED)
        right.spines["top"].set_visible(False)
    return draw()
