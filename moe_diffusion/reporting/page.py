"""The page of a report: one file of HTML that needs no network."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import tqdm

from moe_diffusion import __version__
from moe_diffusion.errors import first_line
from moe_diffusion.ornaments import warn
from moe_diffusion.reporting import tables
from moe_diffusion.reporting.charts import SECTIONS, chart_data, charts
from moe_diffusion.reporting.maps import expert_maps
from moe_diffusion.reporting.pictures import grids
from moe_diffusion.reporting.runs import Run
from moe_diffusion.reporting.tables import mark

_HERE = Path(__file__).parent


def page(runs: Sequence[Run], maps: bool = True, title: str = "") -> str:
    """The text of a report.

    Args:
      maps: whether checkpoints are asked for expert maps, which takes a while.
      title: of the page; names the runs by default.
    """
    title = title or f"Report: {', '.join(run.label for run in runs[:4])}" + "..." * (len(runs) > 4)
    pictures = grids(runs)  # these may add notes to the runs, which the cards show
    found = [_maps(run) for run in _slowly(runs)] if maps else []
    drawn = charts(runs)
    data = {
        "runs": [run.label for run in runs],
        "charts": [chart_data(chart, runs) for chart in drawn],
        "grids": pictures,
        "maps": found,
    }
    parts = {
        "title": escape(title),
        "made": f"{datetime.datetime.now(datetime.UTC):%d %B %Y, %H:%M} UTC",
        "version": escape(__version__),
        "style": (_HERE / "page.css").read_text(),
        "script": (_HERE / "page.js").read_text(),
        "cards": tables.cards(runs),
        "curves": _curves(drawn, runs),
        "numbers": tables.numbers_table(runs),
        "evaluations": tables.evaluations_table(runs),
        "samples": _samples(runs, pictures),
        "maps": _map_places(runs, found) if maps else _said("Left out (--no-maps)."),
        "config_choice": _config_choice(runs),
        "config": tables.config_table(runs),
        "parameters": tables.parameters_table(runs),
        # Inside of a script, "</" would end it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return Template((_HERE / "page.html").read_text()).substitute(parts)


def _slowly(runs: Sequence[Run]) -> Any:
    return tqdm.tqdm(runs, desc="expert maps", unit="run", disable=len(runs) < 2)


def _maps(run: Run) -> dict[str, Any]:
    """The maps of a run, or {"reason": why there are none}."""
    try:
        return expert_maps(run)
    except Exception as error:  # a page without maps is better than none
        if not isinstance(error, ValueError):
            warn(f"{run.label}: without expert maps", error)
        return {"reason": first_line(error)}


def _curves(drawn: Sequence[Any], runs: Sequence[Run]) -> str:
    """Places for the charts, a heading for each section."""
    if not drawn:
        return _said("No run has a line of metrics.")
    found = []
    for section in SECTIONS:
        places = [
            f'<figure class="chart{" large" * (chart.title == "loss")}" data-chart="{number}">'
            f"<figcaption>{escape(chart.title)}</figcaption></figure>"
            for number, chart in enumerate(drawn)
            if chart.section == section
        ]
        if places:
            heading = f"<h3>{section}</h3>" if section != SECTIONS[0] else ""
            found.append(f'{heading}<div class="charts">{"".join(places)}</div>')
    legend = ""
    if len(runs) > 1:
        items = (f"<li>{mark(number)}{escape(run.label)}</li>" for number, run in enumerate(runs))
        legend = f'<ul class="legend" aria-label="Runs">{"".join(items)}</ul>'
    return legend + "".join(found)


def _samples(runs: Sequence[Run], pictures: Sequence[dict[str, Any]]) -> str:
    """A slider over all steps that have pictures, and a place for the picture of each run."""
    steps = sorted({step for grid in pictures for step in grid["steps"]})
    if not steps:
        return _said("No run has pictures in samples/ (train.sample_every is 0).")
    places = [
        f'<figure data-grid="{number}"><img alt=""><figcaption></figcaption></figure>'
        for number, (_, grid) in enumerate(zip(runs, pictures, strict=True))
        if grid["steps"]
    ]
    bar = slider("samples-step", "Step", len(steps), len(steps) - 1, play=len(steps) > 1)
    return f'<div class="controls">{bar}</div><div class="grids">{"".join(places)}</div>'


def _map_places(runs: Sequence[Run], found: Sequence[dict[str, Any]]) -> str:
    """Sliders and places for the maps of each run, or why it has none."""
    parts = []
    for number, (run, maps) in enumerate(zip(runs, found, strict=True)):
        parts.append(f"<h3>{mark(number)}{escape(run.label)}</h3>")
        if "reason" in maps:
            parts.append(_said(f"No maps: {maps['reason']}"))
            continue
        layers, times = len(maps["layers"]), len(maps["times"])
        bars = slider(f"layer-{number}", "Layer", layers, layers - 1)
        bars += slider(f"time-{number}", "Time", times, times - 1, play=times > 1)
        if maps["used"]:
            bars += (
                f'<label>Show <select id="show-{number}"><option value="strongest">the expert with '
                'the largest weight</option><option value="used">how many experts a token uses'
                "</option></select></label>"
            )
        parts.append(
            f'<div data-maps="{number}"><div class="controls">{bars}</div>'
            f'<p class="told">{escape(maps["note"])}</p>'
            '<div class="maps"></div><div class="loads"></div></div>'
        )
    return "".join(parts)


def slider(name: str, label: str, count: int, value: int, play: bool = False) -> str:
    """A labelled slider over `count` places; the page's script says what a place is."""
    button = (
        f'<button type="button" data-play="{name}" aria-label="Play {label.lower()}">▶</button>'
    )
    return (
        f'<div class="slider"><label for="{name}">{label}</label>'
        f'<input type="range" id="{name}" min="0" max="{count - 1}" step="1" value="{value}">'
        f'<output for="{name}"></output>{button * play}</div>'
    )


def _config_choice(runs: Sequence[Run]) -> str:
    """Which rows of the table of configs are shown."""
    several = sum(run.config is not None for run in runs) > 1
    count = tables.differing(runs) if several else 0
    kinds = {"changed": "changed from the defaults", "all": "all"}
    if several:
        kinds = {"differs": f"different between the runs ({count})"} | kinds
    first = "differs" if count else "changed"
    options = "".join(
        f'<option value="{kind}"{" selected" * (kind == first)}>{text}</option>'
        for kind, text in kinds.items()
    )
    return f'<label>Keys <select id="config-rows">{options}</select></label>'


def _said(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
