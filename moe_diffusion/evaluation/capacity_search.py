"""Measures C_infer and image quality of DiffMoE under constant thresholds.

The learned ("dynamic") thresholds keep the experts' load as it was in training. Constant thresholds
trade compute for quality; 2503.14487 calls this "interval search".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.digits import DigitsJudge
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.models import build
from moe_diffusion.models.accounting import forward_flops, parameter_counts
from moe_diffusion.sampling.generate import generate

Cond = Mapping[str, np.ndarray]
Metric = Callable[[np.ndarray, Cond], dict[str, float]]  # (images, conditions) -> numbers by name


def with_threshold(variables: Mapping[str, Any], gamma: float | str) -> dict[str, Any]:
    """The variables with every threshold at gamma; "dynamic" leaves them as they are.

    The config key `model.router.threshold` has the same effect, but needs a new compilation.
    """
    if gamma == "dynamic":
        return dict(variables)
    thresholds = jax.tree.map(lambda old: jnp.full_like(old, gamma), variables["router_state"])
    return {**variables, "router_state": thresholds}


def metric_for(config: ConfigDict) -> Metric | None:
    """The metric for the samples of a run: a classifier for digits, None for other data."""
    if config.data.source != "digits":
        return None
    judge = DigitsJudge()

    def accuracy(images: np.ndarray, cond: Cond) -> dict[str, float]:
        return {"class_accuracy": judge.score(images, cond["label"])["class_accuracy"]}

    return accuracy


def search(
    config: ConfigDict,
    variables: Mapping[str, Any],
    thresholds: Sequence[float | str],
    cond: Cond,
    *,
    seed: int = 0,
    batch_size: int = 64,
    metric: Metric | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Draws the same images under each threshold.

    Args:
      variables: of a DiffMoE model.
      thresholds: numbers, or "dynamic" for the learned ones in `variables["router_state"]`.
      cond: {field: [N, ...]}, the condition of each image.
      batch_size: images drawn together. It changes the result, because DiffMoE pools a batch.
      report: called with each row as soon as it is known.

    Returns:
      One row for each threshold: threshold, c_infer_avg (experts per token), dropped (the share
      that `max_capacity` refused), activated_params (Eq. 40, with the predictor) and gflops (of one
      evaluation for one image), both at that C_infer, and what `metric` returns.

    Raises:
      UserError: the model is not a DiffMoE, or its samples are not finite.
    """
    if config.model.router.name != "diffmoe":
        raise UserError(
            f"model.router.name is {config.model.router.name}, but thresholds are DiffMoE's: "
            "choose a run with router diffmoe"
        )
    config = ConfigDict(config)
    config.model.router.threshold = "dynamic"  # use the thresholds in router_state
    model = build(config.model)
    observer = RoutingObserver(model)
    sampler = observer.watch(make_sampler(observer, config), len(next(iter(cond.values()))))
    rows = []
    for threshold in thresholds:
        observer.reset()
        images = generate(
            sampler,
            with_threshold(variables, threshold),
            cond,
            model.input_shape,
            seed=seed,
            batch_size=batch_size,
        )
        stats = observer.stats()
        capacity = stats["c_infer_avg"]
        row = {
            "threshold": threshold,
            "c_infer_avg": capacity,
            "dropped": stats["dropped"],
            "activated_params": parameter_counts(model, capacity)["total"].activated,
            "gflops": forward_flops(model, experts_per_token=capacity)["total"] / 1e9,
        }
        if metric:
            row |= metric(images, cond)
        report(row)
        rows.append(row)
    return rows
