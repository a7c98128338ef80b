"""Tables in Markdown: our numbers beside the paper's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from moe_diffusion import config as configs
from moe_diffusion.models import build
from moe_diffusion.models.accounting import Count, forward_flops, parameter_counts
from moe_diffusion.reproduction.commands import Options, judging
from moe_diffusion.reproduction.items import Item, Row

NAMES = {
    "fid": "FID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "activated": "activated, 10^6",
}


def compared(item: Item, options: Options, results: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each judged row; cells are "ours (the paper's)". "" if no row is judged.

    The columns are the paper's, or else all that was measured.
    """
    judged = [step for step in judging(item, options) if step.row]
    if not judged:
        return ""
    rows = [step.row for step in judged]
    found = [results[str(step)] for step in judged]
    many = any(len(lines) > 1 for lines in found)  # several guidance scales in one row
    measured = {row.label: _by_guidance(f, many) for row, f in zip(rows, found, strict=True)}
    paper = {row.label: _named(row.published, many) for row in rows}
    columns = dict.fromkeys(key for numbers in paper.values() for key in numbers)
    columns = list(columns or dict.fromkeys(key for line in measured.values() for key in line))
    lines, groups = [], {}
    for row in rows:
        ours = measured[row.label] | {"activated": _activated(row, options)}
        numbers = paper[row.label]
        lines.append([row.label, *(_cell(ours.get(c), numbers.get(c)) for c in columns)])
        if row.group:
            groups.setdefault(row.group, []).append([ours[c] for c in columns])
    for name, found_of_group in groups.items():
        spread = [_spread(values) for values in zip(*found_of_group, strict=True)]
        lines.append([f"{name}, {len(found_of_group)} seeds", *spread])
    differing = _deviations([line for lines_of_row in found for line in lines_of_row])
    return _page(item, ["model", *map(_title, columns)], lines, differing)


UNITS = {"10^6": 10**6, "2^20": 2**20}


def counts(item: Item) -> dict[str, dict[str, Count]]:
    """Label of a row -> parameters of its config by kind of module."""
    return {row.label: _cost(row.config)[0] for row in item.rows}


def counted(item: Item) -> str:
    """Parameters of the rows' configs by kind of module, in the item's unit, and their FLOPs.

    By kind they are all parameters, or the activated ones if the item's picture shows these.
    """
    found, unit = counts(item), UNITS[item.counts]
    kinds = dict.fromkeys(kind for ours in found.values() for kind in ours if kind != "total")
    head = {"activated": f"activated, {item.counts}", "total": "total"}
    if any("tflops" in row.published for row in item.rows):
        head["tflops"] = "FLOPs an image, 10^12"
    head |= {kind: f"{kind}, activated" if item.bars else kind for kind in kinds}
    lines = []
    for row in item.rows:
        model = found[row.label]
        ours = {k: (c.activated if item.bars else c.total) / unit for k, c in model.items()}
        ours |= {"activated": model["total"].activated / unit, "total": model["total"].total / unit}
        if "tflops" in head:
            ours["tflops"] = _cost(row.config)[1] / 1e12
        lines.append([row.label, *(_cell(ours.get(c), row.published.get(c)) for c in head)])
    return _page(item, ["model", *head.values()], lines)


@functools.lru_cache(maxsize=64)  # a table and its picture ask for the same
def _cost(spec: str) -> tuple[dict[str, Count], float]:
    """Parameters of a config by kind of module, and FLOPs of an image."""
    model = build(configs.load(spec).model)
    return parameter_counts(model), forward_flops(model)["total"]


def _by_guidance(results: list[dict[str, Any]], many: bool) -> dict[str, float]:
    """{"fid@1.5": ...} of the results of one protocol."""
    found = {}
    for result in results:
        found |= {f"{name}@{result['cfg']:g}": value for name, value in result["metrics"].items()}
    return _named(found, many)


def _named(numbers: Mapping[str, float], many: bool) -> dict[str, float]:
    """Without the guidance scale, if every row has but one, which may be another."""
    return {key if many else key.partition("@")[0]: value for key, value in numbers.items()}


def _activated(row: Row, options: Options) -> float:
    """Activated parameters in millions, at the capacity of training."""
    config = (
        configs.load(row.config) if row.config else configs.load_json(f"{options.run}/config.json")
    )
    return parameter_counts(build(config.model))["total"].activated / 1e6


def _title(column: str) -> str:
    metric, _, cfg = column.partition("@")
    return NAMES.get(metric, metric) + (f", guidance {cfg}" if cfg else "")


def _cell(ours: float | None, paper: float | None) -> str:
    text = "-" if ours is None else f"{ours:,.2f}"
    return text if paper is None else f"{text} ({paper:g})"


def _spread(values: Sequence[float]) -> str:
    """ "mean (least to most)", as short as the numbers need."""
    digits = 2 if max(values) >= 10 else 3
    mean, least, most = (f"{f(values):,.{digits}f}" for f in (fmean, min, max))
    return f"{mean} ({least} to {most})"


def _deviations(results: list[dict[str, Any]]) -> str:
    """One sentence on what differs from the protocols; "" if nothing does."""
    asked = (result["protocol"] for result in results)
    texts = (text for protocol in asked if protocol for text in protocol["deviations"])
    different = list(dict.fromkeys(texts))
    return f"Not as published: {'; '.join(different)}." if different else ""


def _page(item: Item, head: list[str], lines: list[list[str]], note: str = "") -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = "Ours; the paper's number in parentheses."
    return "\n\n".join(filter(None, [f"# {item.title}", table, notes, item.note, note])) + "\n"
