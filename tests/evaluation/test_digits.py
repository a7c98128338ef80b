"""The judge: sure about real digits, unmoved by noise, and it knows a copy."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.digits import DigitsFeatures, DigitsJudge
from moe_diffusion.evaluation.metrics import frechet_distance, gaussian_of


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge()


def test_real_held_out_digits(judge):
    heldout = Digits("test")
    scores = judge.score(heldout.images, heldout.labels)
    assert scores["class_accuracy"] == scores["classifier_accuracy"] >= 0.98
    assert scores["nearest_train_distance"] == scores["nearest_train_distance_heldout"] > 0.5


def test_copies_have_distance_zero(judge):
    train = Digits("train")
    scores = judge.score(train.images[::7], train.labels[::7])
    assert scores["nearest_train_distance"] == 0
    assert scores["class_accuracy"] > 0.99


def test_distance_by_hand(judge):
    # One black pixel of a training image made white: one pixel differs by 1.
    image = Digits("train").images[:1].copy()
    assert image[0, 0, 0, 0] == -1
    image[0, 0, 0, 0] = 1
    assert judge.score(image, [0])["nearest_train_distance"] == 1


def test_wrong_labels_and_noise_score_low(judge):
    heldout = Digits("test")
    assert judge.score(heldout.images, (heldout.labels + 1) % 10)["class_accuracy"] < 0.02
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    scores = judge.score(noise, np.arange(500) % 10)
    assert scores["class_accuracy"] < 0.25
    assert scores["nearest_train_distance"] > 2 * scores["nearest_train_distance_heldout"]


def test_samples_are_clipped_first(judge):
    heldout = Digits("test")
    beyond = np.where(np.abs(heldout.images) == 1, 5 * heldout.images, heldout.images)
    assert judge.score(beyond, heldout.labels) == judge.score(heldout.images, heldout.labels)


def test_judge_is_deterministic(judge):
    images = np.random.default_rng(1).uniform(-1, 1, (50, 8, 8, 1)).astype(np.float32)
    labels = np.arange(50) % 10
    assert DigitsJudge().score(images, labels) == judge.score(images, labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8)), [0, 0], "must be"),
        (np.zeros((0, 8, 8, 1)), [], "must be"),
        (np.zeros((2, 8, 8, 1)), [0], "2 digits to judge got labels of shape"),
        (np.full((1, 8, 8, 1), np.nan), [0], "NaN"),
    ],
)
def test_judge_refuses(judge, images, labels, message):
    with pytest.raises(UserError, match=message):
        judge.score(images, labels)


def test_features_tell_digits_from_noise():
    extractor = DigitsFeatures()
    train, heldout = Digits("train"), Digits("test")

    def distance(images):
        return frechet_distance(gaussian_of(extractor(images)["pool"]), reference)

    reference = gaussian_of(extractor(train.images)["pool"])
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    assert distance(heldout.images) < 0.3 < 5 < distance(noise)
    zeros = train.images[train.labels == 0]  # every image is perfect, but nine classes are missing
    assert distance(zeros) > 20 * distance(heldout.images)


def test_features_are_trained_once_and_kept(tmp_path, monkeypatch):
    images = Digits("test").images[:5]
    first = DigitsFeatures(tmp_path)(images)["pool"]
    assert first.shape == (5, DigitsFeatures.dims) and first.dtype == np.float32
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])  # damaged: trained again, with the same result
    np.testing.assert_array_equal(DigitsFeatures(tmp_path)(images)["pool"], first)
    assert kept.read_bytes()[-200:] == whole[-200:]
    monkeypatch.delattr("moe_diffusion.evaluation.digits._train_layers")
    np.testing.assert_array_equal(DigitsFeatures(tmp_path)(images)["pool"], first)


def test_features_need_no_place_to_be_kept(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert DigitsFeatures(tmp_path / "file")(Digits("test").images[:2])["pool"].shape == (2, 32)
