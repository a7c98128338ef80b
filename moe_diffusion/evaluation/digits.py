"""Judges generated digits: are they the digit that was asked for, and are they new?"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError


class DigitsJudge:
    """A classifier fitted on the training digits, and the training digits to compare with.

    The classifier is a support vector machine with an RBF kernel on pixel values in [0, 1].
    It knows the training split alone, so its accuracy on the held-out split
    (`classifier_accuracy`) says how far its verdict on samples can be trusted. Deterministic.
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
        """f32[N, 8, 8, 1] in [-1, 1] (clipped to it) -> i32[N], the digit each looks like."""
        return self._classifier.predict(_flat_pixels(images))

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy and novelty of samples.

        Args:
          images: f32[N, 8, 8, 1] in [-1, 1]; clipped to it.
          labels: i32[N], the digit that each sample was asked to be.

        Returns:
          class_accuracy: share of samples that are classified as their own label.
          classifier_accuracy: the same of the real held-out images: the classifier's own errors.
          nearest_train_distance: median L2 distance, over pixels in [0, 1], of the samples to their
            nearest training image; near 0 for copies.
          nearest_train_distance_heldout: the same of the real held-out images: what new images of
            the same distribution show.

        Raises:
          UserError: images of another shape, none, not finite, or labels of another number.
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


def _flat_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 8, 8, 1] in [-1, 1] -> f64[N, 64] in [0, 1]."""
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or images.shape[1:] != Digits.image_shape or not len(images):
        raise UserError(f"digits to judge must be [N, 8, 8, 1], got {list(images.shape)}")
    if not np.isfinite(images).all():
        raise UserError("digits to judge hold NaN or infinity")
    return (np.clip(images, -1, 1).reshape(len(images), -1) + 1) / 2
