"""The metrics against definitions by hand and against scipy's matrix square root."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import compare, metrics
from moe_diffusion.evaluation import features as kept_features
from moe_diffusion.evaluation.features import FeatureSet, InceptionFeatures


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


def torch_fidelity_score(logits: np.ndarray) -> tuple[float, float]:
    """The algorithm of torch-fidelity 0.4.0, `metric_isc.py`, in numpy: shuffle, ten parts, KL."""
    order = np.random.RandomState(2020).permutation(len(logits))
    x = logits[order].astype(np.float64)
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    edges = [part * len(x) // 10 for part in range(11)]
    scores = []
    for i in range(10):
        part = p[edges[i] : edges[i + 1]]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


GOLDEN = Path(__file__).parents[1] / "goldens/metrics/io.npz"
# What torch-fidelity's own `isc_features_to_metric` returned for these two arrays: it was run with
# torch 2.13 on the recorded logits [400, 40], and on standard_normal((1237, 12)) * 2 of seed 3.
OF_TORCH_FIDELITY = {
    "recorded": (2.840042213682822, 0.15828065964213164),
    "random": (2.758258342044045, 0.10627176034450381),
}


@pytest.mark.parametrize("which", OF_TORCH_FIDELITY)
def test_inception_score_is_that_of_torch_fidelity(which):
    """1,237 images are not divisible by ten: parts of 123 and of 124."""
    if which == "recorded":
        logits = np.load(GOLDEN)["in/logits"]
    else:
        logits = np.random.default_rng(3).standard_normal((1237, 12)).astype(np.float32) * 2
    ours = metrics.inception_score(logits, **compare.SCORES["torch-fidelity"])
    assert ours == pytest.approx(torch_fidelity_score(logits), rel=1e-6)
    assert ours == pytest.approx(OF_TORCH_FIDELITY[which], rel=1e-6)


def test_inception_score_has_at_most_one_part_per_image():
    logits = np.random.default_rng(0).standard_normal((7, 5))
    assert metrics.inception_score(logits, parts=10, shuffle=0) == pytest.approx((1, 0))


def in_class_order(classes: int, each: int) -> np.ndarray:
    """Logits of a good classifier, f64[classes * each, classes + 8], sorted by class."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((classes * each, classes + 8))
    logits[np.arange(len(logits)), np.repeat(np.arange(classes), each)] += 5 + rng.standard_normal(
        len(logits)
    )
    return logits


def test_images_in_class_order_score_as_in_random_order():
    """20 classes, 100 images each: in class order every part of 200 has two classes."""
    logits = in_class_order(20, 100)
    mixed = np.random.default_rng(1).permutation(logits)
    shuffled, deviation = metrics.inception_score(logits, **compare.SCORES["torch-fidelity"])
    random_order, _ = metrics.inception_score(mixed, split=200)
    class_order, _ = metrics.inception_score(logits, split=200)
    assert abs(shuffled - random_order) < deviation < 0.5
    assert class_order < 2.2 and random_order > 3 * class_order


class WithClassifier:
    """As Inception: all five kinds of metric."""

    names = InceptionFeatures.names
    classifier = np.random.default_rng(8).standard_normal((6, 9)).astype(np.float32)


def feature_set(vectors: np.ndarray) -> FeatureSet:
    spatial = metrics.gaussian_of(vectors[:, :4] ** 2)
    return FeatureSet("set", metrics.gaussian_of(vectors), spatial, vectors)


def test_no_metric_but_the_inception_score_depends_on_the_order():
    rows, reference = features(0, 300, 6), feature_set(features(1, 250, 6, shift=0.1))
    found, _ = compare.compare(feature_set(rows), reference, WithClassifier())
    assert list(found) == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    del found["inception_score"]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        other, _ = compare.compare(feature_set(rows[order]), reference, WithClassifier())
        del other["inception_score"]
        assert other == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_a_part_of_a_sorted_set_stands_for_all_of_it(monkeypatch):
    """Of 600 vectors in class order KID takes 200: the first would be two of six classes."""
    centres = 10 * np.random.default_rng(0).standard_normal((6, 4))
    rows = np.concatenate([features(i, 100, 4) + centre for i, centre in enumerate(centres)])
    rows, reference = rows.astype(np.float32), feature_set(rows[::2].astype(np.float32))
    whole = compare.compare(feature_set(rows), reference, WithFour())[0]["kid"]
    of_two = metrics.kernel_distance(reference.vectors, rows[:200])
    monkeypatch.setattr(compare, "KERNEL_VECTORS", 200)
    part = compare.compare(feature_set(rows), reference, WithFour())[0]["kid"]
    assert abs(part - whole) < 0.1 * abs(of_two - whole)


class WithFour(WithClassifier):
    classifier = WithClassifier.classifier[:4]


def test_the_vectors_that_are_kept_are_of_all_batches(monkeypatch):
    monkeypatch.setattr(kept_features, "MAX_VECTORS", 20)
    rows = np.arange(90, dtype=np.float32)[:, None].repeat(3, 1)
    images = [np.zeros((30, 2, 2, 3), np.uint8)] * 3
    parts = iter(np.split(rows, 3))
    found = kept_features.collect(images, 90, lambda batch: {"pool": next(parts)}, "set")
    assert found.pool.count == 90 and found.pool.mean[0] == pytest.approx(44.5)
    kept = found.vectors[:, 0].astype(int)
    assert kept.tolist() == metrics.chosen(90, 20).tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 20 and (np.bincount(kept // 30) >= 3).all()


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
