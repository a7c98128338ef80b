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
    left_out = ("metrics", "warnings", *_VARIES)
    flat = [_flat({k: v for k, v in r.items() if k not in left_out}) for r in results]
    shared = {k: v for k, v in flat[0].items() if all(f.get(k) == v for f in flat)}
    lines = ["all: " + "; ".join(f"{key} {protocol.text(v)}" for key, v in shared.items())]
    for result, own in zip(results, flat, strict=True):
        rest = {key: value for key, value in own.items() if key not in shared}
        if rest:
            told = "; ".join(f"{key} {protocol.text(value)}" for key, value in rest.items())
            lines.append(f"ema {result['ema']}, cfg {result['cfg']:g}: {told}")
    return "\n".join(lines)


def _flat(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list becomes a key for each of its texts, to be shared or not."""
    found: dict[str, Any] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            found |= {f"{prefix}{key}: {text}": "" for text in value}
        elif value not in (None, "", [], {}):
            found[prefix + key] = value
    return found
