"""Judges generated digits: are they the digit that was asked for, are they new, and how far is the
whole set from the real ones?
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import warnings
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist

from moe_diffusion.caches import cache_folder
from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.archives import open_archive
from moe_diffusion.evaluation.images import to_floats
from moe_diffusion.writing import save_arrays

_WIDTHS = (64, 32)  # of the layers before the last


class DigitsJudge:
    """A classifier fitted on the training digits, and the training digits to compare with.

    The classifier is a support vector machine with an RBF kernel on pixel values in [0, 1].
    It is fitted on the training split alone, so its accuracy on the held-out split
    (`classifier_accuracy`) says how far its verdict on samples can be trusted. It is deterministic.
    """

    def __init__(self):
        from sklearn.svm import SVC  # imported here: takes a second

        train, heldout = Digits("train"), Digits("test")
        self._train = _flat_pixels(train.images)
        self._classifier = SVC(C=10).fit(self._train, train.labels)
        pixels = _flat_pixels(heldout.images)
        self.classifier_accuracy = float(np.mean(self.classify(heldout.images) == heldout.labels))
        self.heldout_distance = float(np.median(self._distances(pixels)))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images f32[N, 8, 8, 1] in [-1, 1] (clipped) -> i32[N], the digit that each looks like."""
        return self._classifier.predict(_flat_pixels(images))

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy and novelty of samples.

        Args:
          images: f32[N, 8, 8, 1] in [-1, 1]; values beyond are clipped.
          labels: i32[N], the digit that each sample was asked to be.

        Returns:
          class_accuracy: share of samples that are classified as their own label.
          classifier_accuracy: the same share for real held-out images. It shows the classifier's
            own errors.
          nearest_train_distance: median L2 distance, over pixels in [0, 1], of the samples to their
            nearest training image; near 0 for copies.
          nearest_train_distance_heldout: the same median for real held-out images. New images of
            the same distribution have about this distance.

        Raises:
          UserError: there are no images, they have another shape or are not finite, or the number
            of labels differs.
        """
        pixels = _flat_pixels(images)
        if np.shape(labels) != (len(pixels),):
            raise UserError(f"{len(pixels)} digits to judge got labels of shape {np.shape(labels)}")
        return {
            "class_accuracy": float(np.mean(self._classifier.predict(pixels) == labels)),
            "classifier_accuracy": self.classifier_accuracy,
            "nearest_train_distance": float(np.median(self._distances(pixels))),
            "nearest_train_distance_heldout": self.heldout_distance,
        }

    def _distances(self, pixels: np.ndarray) -> np.ndarray:
        """L2 distance of each row to its nearest training image, exactly 0 for a copy."""
        return cdist(pixels, self._train).min(axis=1)


class DigitsFeatures:
    """32 features of a digit: the last hidden layer of a small classifier (64-64-32-10, tanh).

    The classifier is trained on the training split alone, with a fixed seed. This takes seconds;
    the weights are kept in the cache folder. The distances between these features are not FIDs, so
    they have their own names, like fd_digits.
    """

    dims = 32
    names = {
        "frechet": "fd_digits",
        "precision": "precision_digits",
        "recall": "recall_digits",
        "kernel": "kd_digits",
    }
    note = {"network": "digits classifier 64-64-32-10"}

    def __init__(self, cache: Path | None = None):
        folder = cache or cache_folder("digits")
        version = importlib.metadata.version("scikit-learn")
        path = folder / f"digits_features_sklearn{version}.npz"
        try:
            self._layers = _load(path)
        except UserError:  # there is no file yet, or it is damaged
            self._layers = _train_layers()
            with contextlib.suppress(OSError):  # the cache is optional
                _store(self._layers, path)

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Images u8 or f32[B, 8, 8, 1] in [-1, 1] (clipped) -> {"pool": f32[B, 32]}."""
        rows = _flat_pixels(to_floats(batch))
        for weight, bias in self._layers:
            rows = np.tanh(rows @ weight + bias)
        return {"pool": rows.astype(np.float32)}


def _train_layers() -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.exceptions import ConvergenceWarning  # imported here: takes a second
    from sklearn.neural_network import MLPClassifier

    train = Digits("train")
    network = MLPClassifier(
        _WIDTHS,
        activation="tanh",
        alpha=0.01,
        batch_size=64,
        learning_rate_init=0.003,
        max_iter=80,
        random_state=0,
    )
    with warnings.catch_warnings():  # it trains 80 epochs, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(_flat_pixels(train.images), train.labels)
    return list(zip(network.coefs_[:2], network.intercepts_[:2], strict=True))


def _load(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The layers that `_store` wrote. Raises UserError if the file holds something else."""
    with open_archive(path) as archive:
        layers = []
        for i, width in enumerate(_WIDTHS):
            shapes = {f"weight_{i}": (8 * 8, *_WIDTHS)[i : i + 2], f"bias_{i}": (width,)}
            for name, shape in shapes.items():
                if archive.headers[name].shape != shape:
                    raise UserError(f"{name} of {path} has another shape than {shape}")
            layers.append(tuple(archive.numbers(name, np.float64) for name in shapes))
        return layers


def _store(layers: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    arrays = {f"weight_{i}": weight for i, (weight, _) in enumerate(layers)}
    arrays |= {f"bias_{i}": bias for i, (_, bias) in enumerate(layers)}
    save_arrays(path, arrays)


def _flat_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 8, 8, 1] in [-1, 1] -> f64[N, 64] in [0, 1]."""
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or images.shape[1:] != Digits.image_shape or not len(images):
        raise UserError(f"digits to judge must be [N, 8, 8, 1], got {list(images.shape)}")
    if not np.isfinite(images).all():
        raise UserError("digits to judge hold NaN or infinity")
    return (np.clip(images, -1, 1).reshape(len(images), -1) + 1) / 2
