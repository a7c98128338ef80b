"""The parts of a report that are text: what runs are, their configs, parameters and results."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion import heartbeat
from moe_diffusion.config.schema import fields_of_others, leaves, router_fields, shared
from moe_diffusion.errors import UserError
from moe_diffusion.metric_lines import MACHINE
from moe_diffusion.models import build
from moe_diffusion.models.accounting import Count, forward_flops, parameter_counts
from moe_diffusion.reporting.charts import ends
from moe_diffusion.reporting.runs import Run, readable

Counts = tuple[dict[str, Count], dict[str, float]]


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, classes: Sequence[str] = ()
) -> str:
    """A table whose first column names its rows; all cells are text."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = []
    for number, (name, *cells) in enumerate(rows):
        kind = f' class="{classes[number]}"' if classes and classes[number] else ""
        body = "".join(f"<td>{escape(text)}</td>" for text in cells)
        lines.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{body}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


# --- runs ----------------------------------------------------------------------------------------


def cards(runs: Sequence[Run]) -> str:
    """What every run is, in a few lines."""
    return "".join(_card(number, run) for number, run in enumerate(runs))


def _card(number: int, run: Run) -> str:
    config, summary = run.config, run.summary
    last = f"step {run.step:,}"
    if config:
        last += f" of {config.train.num_steps:,}"
    if summary.get("phase"):
        last += f", {summary['phase']}"
    lines = [("progress", last)]
    if config:
        lines.insert(0, ("config", config.name))
        lines.append(("data", f"{config.data.source}, {config.data.batch_size:,} images a step"))
    if column := run.columns.get("loss"):
        lines.append(("loss", f"{list(column.values())[-1]:.4g} at step {max(column):,}"))
    if counted := counts_of(run):
        total = counted[0]["total"]
        lines.append(("parameters", f"{millions(total.total)}, {millions(total.activated)} used"))
    if "devices" in summary:
        many = f" on {summary['hosts']} hosts" if summary.get("hosts", 1) != 1 else ""
        lines.append(("devices", f"{summary['devices']} x {summary.get('device')}{many}"))
    lines += heartbeat.told(summary)
    lines.append(("folder", str(run.folder)))
    terms = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in lines)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    return f"<article><h3>{mark(number)}{escape(run.label)}</h3><dl>{terms}</dl>{notes}</article>"


def mark(number: int) -> str:
    """A dot in the colour of a run's curves."""
    return f'<span class="mark c{number % 8}" aria-hidden="true"></span>'


def millions(count: float) -> str:
    """A number of parameters, for people."""
    return f"{count / 1e9:,.3f} billion" if count >= 1e9 else f"{count / 1e6:,.3f} million"


# --- configs -------------------------------------------------------------------------------------


def config_table(runs: Sequence[Run]) -> str:
    """All keys, a column for each run. Rows are marked that differ between runs (class "differs")
    or from the defaults ("changed")."""
    known = [run for run in runs if run.config]
    flat = [_flat(run.config) for run in known]
    defaults = [_defaults(run.config) for run in known]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows, classes = [], []
    for key in keys:
        texts = [readable(values[key]) if key in values else "" for values in flat]
        usual = [key in d and readable(d[key]) == t for d, t in zip(defaults, texts, strict=True)]
        differs, changed = len(set(texts)) > 1, not all(usual)
        default = next((readable(d[key]) for d in defaults if key in d), "")
        rows.append([key, *texts, default])
        classes.append(" ".join(["differs"] * differs + ["changed"] * changed))
    if not rows:
        return '<p class="note">No config.json could be read.</p>'
    head = ["key", *(run.label for run in known), "default"]
    return table(head, rows, "Config of every run", classes)


def differing(runs: Sequence[Run]) -> int:
    """How many keys differ between the runs."""
    flat = [_flat(run.config) for run in runs if run.config]
    keys = {key for values in flat for key in values}
    return sum(len({readable(values.get(key)) for values in flat}) > 1 for key in keys)


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, without the fields of architectures that the model is not of."""
    found, own = leaves(config), config.model.architecture
    others = [f"model.{name}." for name in shared()["model"] if name in ("dit", "jit", "flux")]
    skipped = tuple(name for name in others if name != f"model.{own}.")
    return {key: value for key, value in found.items() if not key.startswith(skipped)}


def _defaults(config: ConfigDict) -> dict[str, Any]:
    return leaves(shared()) | fields_of_others() | router_fields(config.model.router.name)


# --- parameters ----------------------------------------------------------------------------------


def counts_of(run: Run) -> Counts | None:
    """Parameters and FLOPs of a run's model; None, with a note, if it cannot be built."""
    if run.config is None:
        return None
    try:
        return _counted(json.dumps(run.config.model.to_dict(), sort_keys=True, default=list))
    except UserError as error:
        note = f"its model cannot be built, so its parameters are not counted: {error}"
        run.notes += [note] if note not in run.notes else []
        return None


@functools.lru_cache
def _counted(model_config: str) -> Counts:
    """Of the JSON of a config's section `model`."""
    from moe_diffusion import config as configs

    model = build(configs.settle({"model": json.loads(model_config)}).model)
    return parameter_counts(model), forward_flops(model)


def parameters_table(runs: Sequence[Run]) -> str:
    """Parameters by kind, in all and those that a token uses, and GFLOPs of an image."""
    found = [(run, counts) for run in runs if (counts := counts_of(run))]
    if not found:
        return '<p class="note">No model could be built.</p>'
    several = len(found) > 1
    head = ["kind"]
    for run, _ in found:
        prefix = f"{run.label}: " if several else ""
        head += [f"{prefix}parameters, million", f"{prefix}used by a token, million"]
        head.append(f"{prefix}GFLOPs of an image, forward")
    kinds = dict.fromkeys(k for _, (counts, flops) in found for k in (*counts, *flops))
    kinds.pop("total")
    rows = []
    for kind in (*kinds, "total"):
        cells: list[str] = []
        for _, (counts, flops) in found:
            count = counts.get(kind)
            cells += (
                [f"{x / 1e6:,.3f}" for x in (count.total, count.activated)]
                if count
                else [
                    "",
                    "",
                ]
            )
            cells.append(f"{flops[kind] / 1e9:,.4g}" if flops.get(kind) else "")
        rows.append([kind, *cells])
    return table(head, rows, "Parameters of the model", ["" for _ in kinds] + ["total"])


# --- results -------------------------------------------------------------------------------------


def numbers_table(runs: Sequence[Run]) -> str:
    """First, last, least and largest value of every metric."""
    rows = []
    for name, cells in ends(runs):
        for run, values in zip(runs, cells, strict=True):
            if values:
                title = name.removeprefix(MACHINE)
                own = [run.label] if len(runs) > 1 else []
                rows.append([title, *own, *(f"{value:.5g}" for value in values)])
    head = ["metric", *(["run"] if len(runs) > 1 else []), "first", "last", "least", "largest"]
    return table(head, rows, "Numbers of all curves") if rows else ""


def evaluations_table(runs: Sequence[Run]) -> str:
    """The results in evaluations.jsonl; "" if there are none."""
    found = [(run, result) for run in runs for result in run.evaluations]
    names = dict.fromkeys(name for _, result in found for name in result["metrics"])
    how = ("step", "ema", "cfg", "num_samples")
    rows = [
        [run.label, *(_shown(result.get(key)) for key in how)]
        + [_shown(result["metrics"].get(name)) for name in names]
        for run, result in found
    ]
    head = ["run", "step", "average", "guidance (cfg)", "samples", *names]
    return table(head, rows, "Evaluations (evaluate)") if rows else ""


def _shown(value: Any) -> str:
    if type(value) is float and math.isfinite(value):
        return f"{value:.5g}"
    return "" if value is None else str(value)
