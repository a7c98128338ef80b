"""Judges a few samples at intervals while a model trains, with features that cost little."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.buckets import records_of
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.compare import compare
from moe_diffusion.evaluation.digits import DigitsFeatures
from moe_diffusion.evaluation.features import Extractor, FeatureSet
from moe_diffusion.evaluation.metrics import gaussian_of
from moe_diffusion.models.stack import Model
from moe_diffusion.ornaments import ornament
from moe_diffusion.sampling.hooks import FixedSamples
from moe_diffusion.training.state import TrainState

_REFERENCE = 2048  # records of the training source to compare with
_BATCH = 64
_GRID = 4


class PooledFeatures:
    """The mean colour in each cell of a 4x4 grid over the image: layout and colour, no detail.

    It needs no weights, and takes latents as well as images. Distances between these features are
    not FIDs.
    """

    names = {
        "frechet": "fd_pooled",
        "precision": "precision_pooled",
        "recall": "recall_pooled",
        "kernel": "kd_pooled",
    }
    note = {"network": "none: 4x4 means"}

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """f32[B, H, W, C] -> {"pool": f32[B, 16 C]}; fewer if a side has less than four pixels."""
        height, width = (min(_GRID, side) for side in batch.shape[1:3])
        rows = [part.mean(1) for part in np.array_split(batch, height, axis=1)]
        cells = [part.mean(1) for row in rows for part in np.array_split(row, width, axis=1)]
        return {"pool": np.concatenate(cells, axis=-1)}


class EvaluationHook:
    """A hook of the training loop that compares a few samples with the training data.

    Every call draws the same `train.eval_samples` images. It returns eval/fd_digits,
    eval/precision_digits and so on for digits, and eval/fd_pooled and so on for other data. A
    failure, like samples that are not finite, is told in a line, and training goes on.

    Args:
      source: the training data, for the comparison (its images of the model's `input_shape`) and
        for conditions (`default_conditions`).
    """

    def __init__(self, config: ConfigDict, model: Model, source: Any):
        self._samples = FixedSamples(config, model, config.train.eval_samples, source, _BATCH)
        digits = config.data.source in ("digits", "digits_prompts")
        self._extractor: Extractor = DigitsFeatures() if digits else PooledFeatures()
        # The records are spaced evenly, because the source may be sorted by class.
        fit = records_of(source, model.input_shape)
        if not fit:
            raise UserError(
                f"data.source has no images of shape {model.input_shape} to compare samples with: "
                "set train.eval_samples=0, or another size of the model"
            )
        count = min(_REFERENCE, len(fit))
        records = fit.start + np.arange(count) * len(fit) // count
        images = np.stack([source[int(i)]["image"] for i in records])
        self._reference = self._features("training data", images)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        with ornament(f"the evaluation of step {step}"):
            drawn = self._features("samples", self._samples.draw(state))
            found, _ = compare(drawn, self._reference, self._extractor)
            return {f"eval/{name}": value for name, value in found.items()}
        return {}

    def _features(self, name: str, images: np.ndarray) -> FeatureSet:
        vectors = self._extractor(images)["pool"]
        return FeatureSet(name, gaussian_of(vectors), vectors=vectors)
