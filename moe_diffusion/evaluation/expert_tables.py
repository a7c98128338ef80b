"""From sums over the evaluations of a network to numbers on the use of its experts.

Shapes: T times, L layers with experts, E experts. The selection frequency of an expert is the share
of tokens that use it; over the experts of a layer it sums to C_infer, the experts per token. The
share of an expert is its part of a layer's assignments; over the experts it sums to 1. An expert's
capacity is E times its frequency, so that over the experts it averages to C_infer (DiffMoE,
2503.14487, Eq. 8 and 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def tables(times: Sequence[float], sums: np.ndarray, samples: np.ndarray) -> dict[str, Any]:
    """Averages over evaluations; each evaluation of a sample counts alike.

    Args:
      times: T times, ascending.
      sums: f64[T, L, E], the selection frequencies added up over the samples evaluated at a time.
      samples: f64[T], how many there were. A time without any is left out.

    Returns:
      evaluations: how often the network was evaluated for a sample.
      c_infer_avg: experts per token.
      times [T].
      per_layer [L], per_time [T], per_layer_and_time [L][T]: C_infer.
      selection [L][E], selection_by_time [L][T][E]: selection frequencies.
      share, share_by_time: shares, of the same shapes.
      capacity_by_time [L][T][E]: capacities (2503.14487, Figure 12).
      max_over_mean [L]: load of the busiest expert over the mean load; 1 is balanced.
      effective_experts [L]: see `effective`.
    """
    seen = samples > 0
    sums, samples = sums[seen], samples[seen]
    by_time = (sums / samples[:, None, None]).swapaxes(0, 1)  # [L, T, E]
    selection = sums.sum(0) / samples.sum()
    share, share_by_time = shares(selection), shares(by_time)
    num_experts = selection.shape[-1]
    found = {
        "evaluations": int(samples.sum()),
        "c_infer_avg": selection.sum(-1).mean(),
        "times": np.asarray(times)[seen],
        "per_layer": selection.sum(-1),
        "per_time": by_time.sum(-1).mean(0),
        "per_layer_and_time": by_time.sum(-1),
        "selection": selection,
        "share": share,
        "selection_by_time": by_time,
        "share_by_time": share_by_time,
        "capacity_by_time": num_experts * by_time,
        "max_over_mean": num_experts * share.max(-1),
        "effective_experts": effective(share),
    }
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def by_class(names: Sequence[str], sums: np.ndarray, samples: np.ndarray) -> dict[str, Any]:
    """Averages by class; a class that was not drawn is left out.

    Args:
      names: of the classes.
      sums: f64[classes, L, E], the selection frequencies added up over the evaluations of a class.
      samples: f64[classes], how many there were.

    Returns:
      By name of a class:
        per_class: C_infer.
        per_class_and_layer [L]: C_infer.
        selection_by_class, share_by_class [L][E]: selection frequencies and shares.
        experts_in_use_by_class [L]: experts that at least one token used (DSMoE, 2512.01252,
          Figure 2, top). It grows with the number of images.
        effective_experts_by_class [L]: see `effective`.
    """
    seen = np.flatnonzero(samples)
    names = [names[place] for place in seen]
    selection = sums[seen] / samples[seen, None, None]
    share = shares(selection)
    found = {
        "per_class": selection.sum(-1).mean(-1),
        "per_class_and_layer": selection.sum(-1),
        "selection_by_class": selection,
        "share_by_class": share,
        "experts_in_use_by_class": (selection > 0).sum(-1),
        "effective_experts_by_class": effective(share),
    }
    return {name: dict(zip(names, value.tolist(), strict=True)) for name, value in found.items()}


def shares(selection: np.ndarray) -> np.ndarray:
    """Selection frequencies [..., E] over their sum; 0 where no token uses any expert."""
    total = selection.sum(-1, keepdims=True)
    return np.divide(selection, total, out=np.zeros_like(selection), where=total > 0)


def effective(share: np.ndarray) -> np.ndarray:
    """The effective number of experts, exp(entropy of their shares): [..., E] -> [...].

    E if all are used alike, 1 if one does all the work, 0 if none is used.
    """
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(share.any(-1), np.exp(-(share * logs).sum(-1)), 0.0)


def extreme_classes(per_class: Mapping[str, float], most: int = 10) -> tuple[list[str], list[str]]:
    """The classes with the largest C_infer, and those with the smallest, the most extreme first.

    Each list has at most `most` classes and at most half of them, so that no class is in both.
    Equal values are in the order of `per_class`. "null" is no class. Both are empty if the values
    do not differ by more than rounding. DiffMoE (2503.14487), Figures 13 and 14.
    """
    values = {name: value for name, value in per_class.items() if name != "null"}
    count = min(most, len(values) // 2)
    if not count or max(values.values()) - min(values.values()) < 1e-6:
        return [], []
    easiest = sorted(values, key=values.get)
    return sorted(values, key=lambda name: -values[name])[:count], easiest[:count]


def rounded(value: Any, digits: int = 5) -> Any:
    """A tree of dicts and lists with its floats rounded to so many significant digits."""
    if isinstance(value, dict):
        return {name: rounded(part, digits) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
