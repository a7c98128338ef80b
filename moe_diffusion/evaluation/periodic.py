"""A few samples judged at intervals while a model trains, with features that cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.evaluation.compare import compare
from moe_diffusion.evaluation.digits import DigitsFeatures
from moe_diffusion.evaluation.features import Extractor, FeatureSet
from moe_diffusion.evaluation.generate import averaged_variables, generate, spread_labels
from moe_diffusion.evaluation.metrics import gaussian_of
from moe_diffusion.training.state import TrainState

_REFERENCE = 2048  # records of the training source to compare with
_BATCH = 64
_GRID = 4


class PooledFeatures:
    """Means of an image's or latent's 4x4 grid of squares: layout and colour, no detail.

    Needs no weights and works in the space in which the model works. Not an FID.
    """

    names = {
        "frechet": "fd_pooled",
        "precision": "precision_pooled",
        "recall": "recall_pooled",
        "kernel": "kd_pooled",
    }
    note = {"network": "none: 4x4 means"}

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """f32[B, H, W, C] -> {"pool": f32[B, 16 C]}."""
        rows = [part.mean(1) for part in np.array_split(batch, _GRID, axis=1)]
        cells = [part.mean(1) for row in rows for part in np.array_split(row, _GRID, axis=1)]
        return {"pool": np.concatenate(cells, axis=-1)}


class EvaluationHook:
    """A hook of the training loop: the same `train.eval_samples` draws against the training data.

    Returns eval/fd_digits, eval/precision_digits and so on for digits, else eval/fd_pooled ...
    """

    def __init__(self, config: ConfigDict, model: nn.Module, source: Any):
        self._config = config
        self._sampler = make_sampler(model, config)
        self._labels = spread_labels(config.train.eval_samples, config.model.num_classes)
        self._shape = (config.model.image_size, config.model.image_size, config.model.channels)
        digits = config.data.source == "digits"
        self._extractor: Extractor = DigitsFeatures() if digits else PooledFeatures()
        # Evenly over the source, which may be sorted by class.
        count = min(_REFERENCE, len(source))
        records = np.arange(count) * len(source) // count
        images = np.stack([source[int(i)]["image"] for i in records])
        self._reference = self._features("training data", images)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        images = generate(
            self._sampler,
            averaged_variables(self._config, state),
            self._labels,
            self._shape,
            seed=self._config.seed,
            batch_size=min(_BATCH, len(self._labels)),
        )
        found, _ = compare(self._features("samples", images), self._reference, self._extractor)
        return {f"eval/{name}": value for name, value in found.items()}

    def _features(self, name: str, images: np.ndarray) -> FeatureSet:
        vectors = self._extractor(images)["pool"]
        return FeatureSet(name, gaussian_of(vectors), vectors=vectors)
