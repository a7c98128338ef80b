"""What a config comes to, for the pages that count."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from moe_diffusion import config as configs
from moe_diffusion.models import build
from moe_diffusion.models.accounting import Count, forward_flops, parameter_counts


@dataclass(frozen=True)
class Entry:
    """What a config comes to: counts by kind, FLOPs of a forward pass, patches of an image."""

    family: str
    counts: dict[str, Count]
    flops: float
    tokens: int


@functools.cache
def measure(spec: str, *overrides: str) -> Entry:
    """Counts and FLOPs of a config, without its weights."""
    config = configs.load(spec, overrides)
    family = Path(spec.partition(":")[0]).stem.rpartition("_")[0] or Path(spec).stem
    key = repr(config.model.to_dict())
    if key not in _MEASURED:  # some configs differ in training alone
        model = build(config.model)
        flops = forward_flops(model)["total"]
        _MEASURED[key] = parameter_counts(model), flops, model.grid[0] * model.grid[1]
    return Entry(family, *_MEASURED[key])


_MEASURED: dict[str, tuple[dict[str, Count], float, int]] = {}  # section `model` -> what it has
