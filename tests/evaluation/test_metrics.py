"""The metrics against definitions by hand and against scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import metrics


def features(seed: int, count: int, dims: int = 48, shift: float = 0.0) -> np.ndarray:
    """Correlated and of small variance around a large mean, as network features are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((dims, dims)) / np.sqrt(dims)
    rows = rng.standard_normal((count, dims)) @ mixing + 5 + shift
    return rows.astype(np.float32)


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as TTUR, pytorch-fid and ADM evaluate it."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    root = linalg.sqrtm(ca @ cb).real
    return difference @ difference + np.trace(ca + cb - 2 * root)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return metrics.frechet_distance(metrics.gaussian_of(a), metrics.gaussian_of(b))


def test_streamed_moments_are_those_of_all_rows():
    rows = features(0, 700)
    moments = metrics.Moments(48)
    for part in np.split(rows, [1, 64, 65, 300]):
        moments.add(part)
    gaussian = moments.gaussian()
    assert gaussian.count == 700
    np.testing.assert_allclose(gaussian.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(gaussian.covariance, expected, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_frechet_distance_agrees_with_scipy(shift):
    a, b = features(0, 900), features(1, 500, shift=shift)
    np.testing.assert_allclose(distance(a, b), scipy_distance(a, b), rtol=1e-6)


def test_frechet_distance_by_hand():
    """Independent coordinates: (m1 - m2)^2 + (s1 - s2)^2 each."""
    one = metrics.Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    two = metrics.Gaussian(np.array([3.0, 1.0]), np.diag([1.0, 9.0]), 10)
    assert metrics.frechet_distance(one, two) == pytest.approx(9 + 1)
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_a_singular_covariance_gives_a_finite_distance():
    few, many = features(0, 20), features(1, 900)
    assert distance(few, many) > 2 * distance(features(2, 900), many) > 0
    assert distance(few, few) == pytest.approx(0, abs=1e-6)


def test_inception_score_of_sure_and_of_clueless_predictions():
    sure = np.eye(10)[np.arange(200) % 10] * 1000  # probabilities of exactly 0 and 1
    assert metrics.inception_score(sure)[0] == pytest.approx(10)
    assert metrics.inception_score(np.zeros((200, 10)))[0] == pytest.approx(1)
    # Parts of ten images see every class once; parts of five see five.
    assert metrics.inception_score(sure, split=5) == pytest.approx((5, 0))


def by_definition(reference: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def covered(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]
        return (cdist(points, centres) <= radii).any(1).mean()

    return covered(generated, reference), covered(reference, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_over_several_blocks(k, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 64)
    reference, generated = features(0, 150, 6), features(1, 130, 6, shift=0.1)
    expected = by_definition(reference, generated, k)
    assert 0.05 < min(expected) and max(expected) < 0.95
    assert metrics.precision_recall(reference, generated, k) == pytest.approx(expected)


def test_precision_and_recall_of_a_collapsed_and_of_a_wild_model():
    reference = features(0, 200, 6)
    collapsed = reference[:1] + 1e-3 * features(1, 50, 6)
    precision, recall = metrics.precision_recall(reference, collapsed)
    assert precision == 1 and recall < 0.02
    wild = np.concatenate([reference, 100 + features(1, 200, 6)])
    precision, recall = metrics.precision_recall(reference, wild)
    assert precision == 0.5 and recall == 1


def test_kernel_distance_over_several_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 64)
    x, y = (a.astype(np.float64) for a in (features(0, 150, 6), features(1, 90, 6, 0.5)))

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    def pairs(a):
        return (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))

    expected = pairs(x) + pairs(y) - 2 * kernel(x, y).mean()
    assert metrics.kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it is zero on average, and so negative at times."""
    values = [
        metrics.kernel_distance(features(2 * i, 30, 4) - 5, features(2 * i + 1, 30, 4) - 5)
        for i in range(200)
    ]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: metrics.gaussian_of(x[:1]), "needs at least 2 feature vectors, got 1"),
        (lambda x: distance(x, x[:, :5]), "features of 48 and 5 dimensions cannot be compared"),
        (lambda x: metrics.precision_recall(x[:3], x), "need more than 3 images on both sides"),
        (lambda x: metrics.kernel_distance(x[:1], x), "KID needs at least 2 images"),
    ],
)
def test_refuses(function, message):
    with pytest.raises(UserError, match=message):
        function(features(0, 30))


def test_a_broken_vector_is_named():
    rows = features(0, 30)
    rows[7, 3] = np.nan
    moments = metrics.Moments(48)
    moments.add(rows[:5])
    with pytest.raises(UserError, match="feature vector 7 holds NaN or infinity"):
        moments.add(rows[5:])
    assert moments.count == 5
