"""Which curves a report has: metrics of metrics.jsonl, grouped, named and with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_diffusion import time_buckets
from moe_diffusion.metric_lines import MACHINE, RATE
from moe_diffusion.reporting.runs import Run

MOST = 400  # points of a curve; more are averaged


class Chart(NamedTuple):
    """A chart of some metrics.

    Attributes:
      section: the heading that it stands under.
      title, unit: what is drawn, and the label of its axis.
      metrics: name in metrics.jsonl -> name in the legend.
      log: whether its axis begins as a logarithmic one.
    """

    section: str
    title: str
    unit: str
    metrics: Mapping[str, str]
    log: bool = False


_LOSS, _EXPERTS, _JUDGED, _SPEED = "Loss", "Experts", "Evaluation", "Speed"
SECTIONS = (_LOSS, _JUDGED, _EXPERTS, _SPEED)
_M = MACHINE
_KNOWN = (
    Chart(_LOSS, "loss", "loss", {"loss": "loss"}, log=True),
    Chart(_LOSS, "learning rate", "learning rate", {"learning_rate": "learning rate"}),
    Chart(_LOSS, "gradient norm", "norm before clipping", {"grad_norm": "gradient norm"}, log=True),
    Chart(
        _EXPERTS,
        "load of experts, mean over layers",
        "load (1 = average)",
        {"load_max": "busiest", "load_min": "idlest"},
    ),
    Chart(
        _EXPERTS,
        "dead experts, mean over layers",
        "experts without a token",
        {"dead_experts": "dead"},
    ),
    Chart(_SPEED, "images per second", "images/s", {RATE: "images/s"}),
    Chart(
        _SPEED,
        "time of a step",
        "ms",
        {f"{_M}step_ms_median": "median", f"{_M}step_ms_p90": "90%", f"{_M}step_ms_max": "max"},
        log=True,
    ),
    Chart(_SPEED, "wait for input", "ms per step", {f"{_M}input_wait_ms": "wait"}),
    Chart(_SPEED, "memory at the peak", "GB", {f"{_M}memory_gb": "memory"}),
    Chart(_SPEED, "model FLOPs", "TFLOP/s, all devices", {f"{_M}tflops": "TFLOP/s"}),
    Chart(_SPEED, "model FLOPs utilization (MFU)", "share of the bf16 peak", {f"{_M}mfu": "MFU"}),
)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of all metrics that some run has."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    found = [*_KNOWN]
    known = {name for chart in _KNOWN for name in chart.metrics}
    prefix = f"{time_buckets.NAME}/"
    buckets = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    found.append(Chart(_LOSS, "error by time (0 = noise, 1 = image)", "error", buckets, log=True))
    for name in names:
        if name in known or name in buckets:
            continue
        if name.startswith("eval/"):
            title = name.removeprefix("eval/")
            found.append(Chart(_JUDGED, title, title, {name: title}))
        elif name.startswith(MACHINE):
            found.append(Chart(_SPEED, name.removeprefix(MACHINE), name, {name: name}))
        else:
            section = _EXPERTS if _is_of_experts(name) else _LOSS
            found.append(Chart(section, name.replace("_", " "), name, {name: name}))
    present = [
        chart._replace(metrics={k: text for k, text in chart.metrics.items() if k in names})
        for chart in found
    ]
    present = [chart for chart in present if chart.metrics]
    return sorted(present, key=lambda chart: SECTIONS.index(chart.section))


def _is_of_experts(name: str) -> bool:
    words = ("load", "balance", "expert", "dropped", "router", "capacity", "threshold")
    return any(word in name for word in words)


def chart_data(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script draws: the curves of a chart, as steps and values."""
    series, span = [], 1
    for number, run in enumerate(runs):
        for kind, (name, text) in enumerate(chart.metrics.items()):
            if column := run.columns.get(name):
                steps, values, each = thinned(column)
                span = max(span, each)
                series.append({"run": number, "kind": kind, "name": text, "x": steps, "y": values})
    found = {"title": chart.title, "unit": chart.unit, "log": chart.log, "series": series}
    return found | {"kinds": list(chart.metrics.values()), "mean": span}


def thinned(column: Mapping[int, float]) -> tuple[list[int], list[float], int]:
    """At most `MOST` points of a curve: its steps, its values to five digits, and how many logged
    values each is the mean of."""
    steps, values = list(column), np.array(list(column.values()))
    span = -(-len(steps) // MOST)
    starts = np.arange(0, len(steps), span)
    counts = np.diff([*starts, len(steps)])
    means = np.add.reduceat(values, starts) / counts
    ends = [steps[start + count - 1] for start, count in zip(starts, counts, strict=True)]
    return ends, [float(f"{mean:.5g}") for mean in means], span


def ends(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float, float, float, float] | None]]]:
    """Metric -> for each run the first, last, least and largest value; None where it has none."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    rows = []
    for name in sorted(names):
        cells = []
        for run in runs:
            values = list(run.columns.get(name, {}).values())
            cells.append((values[0], values[-1], min(values), max(values)) if values else None)
        rows.append((name, cells))
    return rows
