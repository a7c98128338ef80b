"""Numbers that compare two sets of feature vectors, in numpy, in float64 where precision matters.

FID (arXiv 1706.08500), sFID (2103.03841), Inception Score (1606.03498), precision and recall
(1904.06991) as ADM's evaluator computes them (2105.05233), unbiased KID (1801.01401).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_diffusion.errors import UserError

_BLOCK = 2048  # rows of a distance block: [2048, 2048] f32 is 16 MiB


class Gaussian(NamedTuple):
    """Mean and covariance of a set of feature vectors, which a Frechet distance compares."""

    mean: np.ndarray  # f64[D]
    covariance: np.ndarray  # f64[D, D], divided by count - 1
    count: int  # number of vectors; 0 if a file does not say


class Moments:
    """Running mean and covariance, batch by batch (Chan, Golub and LeVeque, 1979), in float64."""

    def __init__(self, dims: int):
        self.count = 0
        self._mean = np.zeros(dims)
        self._scatter = np.zeros((dims, dims))

    def add(self, features: np.ndarray) -> None:
        """Adds rows [B, D].

        Raises:
          UserError: a row is not finite; then none of them is added.
        """
        check_finite(features, self.count)
        rows = np.asarray(features, np.float64)
        mean = rows.mean(0)
        rows = rows - mean
        total = self.count + len(rows)
        step = mean - self._mean
        self._scatter += rows.T @ rows
        self._scatter += np.outer(step, step * (self.count * len(rows) / total))
        self._mean += step * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian of all rows so far. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1), self.count)


def gaussian_of(features: np.ndarray) -> Gaussian:
    """The Gaussian of all rows of [N, D], without a float64 copy of the whole array."""
    moments = Moments(features.shape[1])
    for rows in _blocks(features):
        moments.add(rows)
    return moments.gaussian()


def check_finite(features: np.ndarray, first: int = 0) -> None:
    """Raises a UserError that names the first vector with NaN or infinity, counted from `first`."""
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if bad.size:
        raise UserError(
            f"feature vector {first + bad[0]} holds NaN or infinity ({bad.size} of {len(features)} "
            "do): its image or the weights are broken"
        )


def check_covariance(matrix: np.ndarray, name: str) -> None:
    """Raises a UserError unless a finite matrix f64[D, D] can be a covariance.

    Files in float32 are symmetric and positive semidefinite only up to rounding, so an asymmetry
    and a negative eigenvalue of 1e-4 times the largest variance pass.
    """
    slack = 1e-4 * max(np.diagonal(matrix).max(), 1e-30)
    symmetric = np.abs(matrix - matrix.T).max() <= slack
    try:
        np.linalg.cholesky(matrix + slack * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        symmetric = False
    if not symmetric:
        raise UserError(
            f"{name} is no covariance, which is symmetric and positive semidefinite: fetch or make "
            "the file again"
        )


def chosen(count: int, limit: int) -> np.ndarray:
    """Which vectors stand for all `count` of a set: indices i64[min(count, limit)], ascending.

    They are drawn without replacement, the same ones every time. The first ones would not do,
    because the images of a file may be sorted by class.
    """
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.RandomState(0).choice(count, limit, replace=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)); FID with Inception's features.

    With C_a = R R^T, the symmetric matrix R^T C_b R has the same eigenvalues as C_a C_b. They are
    real and not negative, and the last trace is the sum of their square roots. So no general
    matrix root is needed, which could come out complex.

    Raises:
      UserError: the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared: make both "
            "with the same network"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    product = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace = np.sqrt(np.maximum(product, 0)).sum()
    difference = a.mean - b.mean
    both = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + both - 2 * trace)


def inception_score(
    logits: np.ndarray, split: int = 5000, parts: int = 0, shuffle: int | None = None
) -> tuple[float, float]:
    """Inception Score exp(mean KL(p(y|x) || p(y))), computed on parts of the images.

    Every part should hold all classes, because of sure predictions it scores the number of classes
    in it. So images in class order must be shuffled.

    Args:
      logits: [N, classes]. ADM's evaluator and the graph of 2015 leave the bias out.
      split: number of consecutive images in a part, the last part may have fewer. So does ADM's
        evaluator (`evaluator.py`, 5,000).
      parts: cuts into so many parts of equal size instead, part i from image i N // parts on. So
        does torch-fidelity (`metric_isc.py`, 10). At most N.
      shuffle: seed of the permutation before the cut, numpy's `RandomState(shuffle)`. So does
        torch-fidelity (2020). None keeps the order.

    Returns:
      Mean and standard deviation over the parts.
    """
    if shuffle is not None:
        logits = logits[np.random.RandomState(shuffle).permutation(len(logits))]
    parts = min(parts, len(logits))
    cuts = [i * len(logits) // parts for i in range(parts)] or range(0, len(logits), split)
    scores = []
    for start, end in itertools.pairwise([*cuts, len(logits)]):
        part = np.asarray(logits[start:end], np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        # The mean KL is the entropy of the mean p minus the mean entropy of p. The mean p must not
        # be 0, because its logarithm is taken.
        mean = np.maximum(p.mean(0), np.finfo(np.float64).tiny)
        scores.append(np.exp((p * log_p).sum(1).mean() - (mean * np.log(mean)).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    reference: np.ndarray, generated: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Shares of vectors that lie inside the balls of the other set.

    Each vector has a ball that reaches to its k-th nearest neighbour in its own set, inclusively.

    Args:
      reference, generated: f32[N, D] and f32[M, D]. Time grows with (N + M)^2, memory with N + M.
      k: number of neighbours, without the vector itself.

    Returns:
      precision: share of generated vectors inside the ball of any reference vector.
      recall: share of reference vectors inside the ball of any generated vector.

    Raises:
      UserError: a set has at most k vectors.
    """
    if min(len(reference), len(generated)) <= k:
        raise UserError(
            f"precision and recall with k={k} need more than {k} images on both sides, got "
            f"{len(reference)} and {len(generated)}"
        )
    centre = reference.mean(0, dtype=np.float64).astype(np.float32)  # less cancellation in f32
    reference, generated = (np.asarray(x, np.float32) - centre for x in (reference, generated))
    inside_reference = _inside(generated, reference, neighbour_radii(reference, k))
    inside_generated = _inside(reference, generated, neighbour_radii(generated, k))
    return float(inside_reference.mean()), float(inside_generated.mean())


def neighbour_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each vector to its k-th neighbour, f32[N]."""
    radii = []
    for rows in _blocks(features):
        # The k + 1 smallest so far; the smallest of all is the vector itself.
        nearest = np.full((len(rows), k + 1), np.inf, np.float32)
        for columns in _blocks(features):
            both = np.concatenate([nearest, _squared_distances(rows, columns)], axis=1)
            nearest = np.partition(both, k, axis=1)[:, : k + 1]
        radii.append(nearest.max(1))
    return np.concatenate(radii)


def kernel_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """KID: the unbiased squared MMD under the kernel (x . y / D + 1)^3; it may be negative.

    It uses all pairs of vectors at once, so their order does not matter. Other codes average over
    subsets of 1,000 vectors, which has the same expectation and more noise.

    Raises:
      UserError: a side has fewer than 2 vectors.
    """
    if min(len(reference), len(generated)) < 2:
        raise UserError("KID needs at least 2 images on both sides")

    def within(x: np.ndarray) -> float:
        diagonal = sum(_kernel((a * a).sum(1), x.shape[1]).sum() for a in _blocks(x, np.float64))
        return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    across = _kernel_sum(reference, generated) / (len(reference) * len(generated))
    return float(within(reference) + within(generated) - 2 * across)


def _kernel(products: np.ndarray, dims: int) -> np.ndarray:
    return (products / dims + 1) ** 3


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    return sum(
        _kernel(a @ b.T, x.shape[1]).sum(dtype=np.float64)
        for a in _blocks(x, np.float64)
        for b in _blocks(y, np.float64)
    )


def _inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """bool[N]: whether each point lies within the squared radius of any centre."""
    inside = []
    for rows in _blocks(points):
        hit = np.zeros(len(rows), bool)
        for start, columns in enumerate(_blocks(centres)):
            reach = radii[start * _BLOCK : start * _BLOCK + len(columns)]
            hit |= (_squared_distances(rows, columns) <= reach).any(1)
        inside.append(hit)
    return np.concatenate(inside)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    norms = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return np.maximum(norms - 2 * (x @ y.T), 0)


def _blocks(array: np.ndarray, dtype: type | None = None) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _BLOCK):
        yield np.asarray(array[start : start + _BLOCK], dtype)
