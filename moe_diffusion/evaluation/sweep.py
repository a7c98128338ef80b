"""What a sweep over averages and guidance scales tells: a row for each, then what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_diffusion.evaluation import protocol

_VARIES = ("ema", "cfg")
_WIDTH = 10


def row(result: Mapping[str, Any], first: bool = False) -> str:
    """A line of a table: average, guidance scale and metrics; `first`: below a line of names.

    Args:
      result: as `evaluator.evaluate` yields it.
    """
    cells = [str(result["ema"]), f"{result['cfg']:g}"]
    cells += [f"{value:.5g}" for value in result["metrics"].values()]
    names = [*_VARIES, *result["metrics"]]
    widths = [max(len(name), _WIDTH) for name in names]
    lines = [names, cells] if first else [cells]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def conditions(results: Sequence[Mapping[str, Any]]) -> str:
    """What all results of a sweep depend on, in one line, and then what only some depend on."""
    left_out = ("metrics", "warnings", "sampling", *_VARIES)
    own = [{k: v for k, v in result.items() if k not in left_out} for result in results]
    shared = _take_shared(own)
    own = [_flat(settings) for settings in own]
    shared |= _take_shared(own)
    lines = ["all: " + _told(shared)]
    for result, settings in zip(results, own, strict=True):
        if settings:
            lines.append(f"ema {result['ema']}, cfg {result['cfg']:g}: {_told(settings)}")
    return "\n".join(lines)


def _take_shared(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Removes what is the same in all dicts from them, and returns it."""
    first = every[0]
    names = [name for name in first if all(d.get(name) == first[name] for d in every)]
    shared = {name: first[name] for name in names}
    for settings in every:
        for name in names:
            settings.pop(name, None)
    return shared


def _told(settings: Mapping[str, Any]) -> str:
    pairs = ((k, v) for k, v in settings.items() if v not in (None, [], {}))
    return "; ".join(f"{name} {protocol.text(value)}".rstrip() for name, value in pairs)


def _flat(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list becomes a key for each of its texts, to be shared or not."""
    found: dict[str, Any] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            found |= {f"{prefix}{key}: {text}": "" for text in value}
        else:
            found[prefix + key] = value
    return found
