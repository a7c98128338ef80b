"""Computes all metrics that two feature sets allow, under the names that the extractor gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import metrics
from moe_diffusion.evaluation.choices import SCORES
from moe_diffusion.evaluation.features import Extractor, FeatureSet

NEIGHBOURS = 3  # k of precision and recall
KERNEL_VECTORS = 10_000  # that KID takes from each side, see `metrics.chosen`


def compare(
    samples: FeatureSet, reference: FeatureSet, extractor: Extractor, score: str = "torch-fidelity"
) -> tuple[dict[str, Any], list[str]]:
    """Computes every metric that both sides have the data for.

    Only the Inception Score depends on the order of the images.

    Args:
      score: whose Inception Score, one of SCORES.

    Returns:
      metrics: name -> value. Precision, recall and KID need the vectors of both sides.
      warnings: one line of text each.

    Raises:
      UserError: the features of the two sides come from different networks.
    """
    names, found, warnings = extractor.names, {}, []
    found[names["frechet"]] = metrics.frechet_distance(samples.pool, reference.pool)
    for side in (samples, reference):
        if 0 < side.pool.count < len(side.pool.mean):
            warnings.append(
                f"{side.name}: {side.pool.count} images for {len(side.pool.mean)} features: the "
                f"covariance is singular and {names['frechet']} is too high; take 10,000 or more"
            )
    if samples.spatial is not None and reference.spatial is not None:
        found[names["spatial"]] = metrics.frechet_distance(samples.spatial, reference.spatial)
    if "score" in names and samples.vectors is not None:
        logits = samples.vectors @ extractor.classifier
        found[names["score"]] = metrics.inception_score(logits, **SCORES[score])[0]
    if samples.vectors is not None and reference.vectors is not None:
        found |= _neighbours_and_kernel(samples.vectors, reference.vectors, names)
    return found, warnings


def _neighbours_and_kernel(
    samples: np.ndarray, reference: np.ndarray, names: dict[str, str]
) -> dict[str, float]:
    found = {}
    if min(len(samples), len(reference)) > NEIGHBOURS:
        precision, recall = metrics.precision_recall(reference, samples, NEIGHBOURS)
        found |= {names["precision"]: precision, names["recall"]: recall}
    reference, samples = (x[metrics.chosen(len(x), KERNEL_VECTORS)] for x in (reference, samples))
    found[names["kernel"]] = metrics.kernel_distance(reference, samples)
    return found


def check_comparable(samples: FeatureSet, reference: FeatureSet, dims: dict[str, int]) -> None:
    """Checks that two sides can be compared, before features are computed.

    Args:
      dims: kind of features ("pool", "spatial") -> how many the network makes.

    Raises:
      UserError: a side holds features of another network, or the images differ in size.
    """
    for side in (samples, reference):
        for kind, gaussian in (("pool", side.pool), ("spatial", side.spatial)):
            if gaussian is not None and len(gaussian.mean) != dims.get(kind):
                raise UserError(
                    f"{side.name} holds {len(gaussian.mean)} {kind} features an image, the network "
                    f"makes {dims.get(kind, 'none')}: it was made with another network"
                )
    if samples.images is not None and reference.images is not None:
        ours, theirs = samples.images.shape[:2], reference.images.shape[:2]
        if ours != theirs:
            raise UserError(
                f"the images to judge are {ours[1]}x{ours[0]}, those of {reference.name} "
                f"{theirs[1]}x{theirs[0]}: take the reference of the same size"
            )
