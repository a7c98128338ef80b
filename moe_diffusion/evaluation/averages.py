"""Sums of what evaluations of a network show of samples, by class and by time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np


class Averages:
    """Adds up arrays of several names; all get the same samples.

    Args:
      classes: how many; the last is "no condition".
    """

    def __init__(self, classes: int):
        self.samples_of_class = np.zeros(classes)
        self._samples: dict[float, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self._by_class: dict[str, np.ndarray] = {}
        self._by_time: dict[str, dict[float, np.ndarray]] = defaultdict(dict)

    def add(
        self, time: float, null: int, places: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Adds n samples that are evaluated at a time.

        Args:
          null: 1 if they have no condition.
          places: i64[n], their classes.
          values: name -> [n, ...].
        """
        np.add.at(self.samples_of_class, places, 1)
        self._samples[time][null] += len(places)
        for name, value in values.items():
            shape = value.shape[1:]
            sums = self._by_class.setdefault(name, np.zeros((len(self.samples_of_class), *shape)))
            np.add.at(sums, places, value)
            sums = self._by_time[name].setdefault(time, np.zeros((2, *shape)))
            sums[null] += value.sum(0)

    @property
    def times(self) -> list[float]:
        """The times, ascending."""
        return sorted(self._samples)

    @property
    def samples(self) -> np.ndarray:
        """f64[times, 2]: evaluated samples with and without a condition."""
        return np.stack([self._samples[time] for time in self.times])

    @property
    def names(self) -> list[str]:
        return list(self._by_class)

    def by_class(self, name: str) -> np.ndarray:
        """f64[classes, ...], sums."""
        return self._by_class[name]

    def by_time(self, name: str) -> np.ndarray:
        """f64[times, 2, ...], sums over samples with and without a condition."""
        return np.stack([self._by_time[name][time] for time in self.times])

    def means(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over all, [times, ...] and [classes, ...] of the conditional samples, if any.

        The rows of times and classes without a sample are NaN.
        """
        kind = 0 if self.samples[:, 0].any() else 1
        sums, samples = self.by_time(name)[:, kind], self.samples[:, kind]
        rows = (samples, self.samples_of_class)
        with np.errstate(invalid="ignore"):
            by_time, by_class = (
                total / count.reshape(-1, *[1] * (total.ndim - 1))
                for total, count in zip((sums, self.by_class(name)), rows, strict=True)
            )
        return sums.sum(0) / samples.sum(), by_time, by_class
