"""Measures C_infer and image quality of DiffMoE under constant thresholds.

The learned ("dynamic") thresholds keep the experts' load as it was in training. Constant thresholds
trade compute for quality; 2503.14487 calls this "interval search" (Eq. 16, Table 10, Figure 7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from moe_diffusion.evaluation.evaluator import Request, evaluate

COLUMNS = ("threshold", "c_infer_avg", "dropped", "activated_params", "gflops")


def search(
    request: Request,
    thresholds: Sequence[float | str],
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Draws the same images under each threshold, and judges them if there is something to.

    Args:
      request: a run of DiffMoE, and what its images are compared with. Without a reference nothing
        is judged, except for digits, whose reference is at hand.
      thresholds: numbers, or "dynamic" for the learned ones.
      report: called with each row as soon as it is known.

    Returns:
      One row for each threshold: threshold, c_infer_avg (experts per token), dropped (the share
      that `max_capacity` refused), activated_params (Eq. 40, with the predictor), gflops (of one
      evaluation for one image), both at that C_infer, "metrics" (name -> number), and "result",
      what `evaluate` yields.

    Raises:
      UserError: the model is not a DiffMoE, or what `evaluate` raises.
    """
    rows = []
    for result in evaluate(dataclasses.replace(request, thresholds=tuple(thresholds))):
        row = {name: result[name] for name in COLUMNS}
        row |= {"metrics": result["metrics"], "result": result}
        report(row)
        rows.append(row)
    return rows
