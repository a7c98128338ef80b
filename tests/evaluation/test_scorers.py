"""Scores of images for prompts, of a CLIP and a judge that are plain to see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion.evaluation.scorers import SCORERS, ClipScore, Wanted, chosen_scorers


class Clip:
    """A text is a number of degrees; a picture has as many as its first pixel says."""

    name, fingerprint = "clip", "0123"
    network = SimpleNamespace(dtype=np.float32)

    def __init__(self):
        self.texts = []

    def of_texts(self, texts):
        self.texts.append(texts)
        angles = np.deg2rad([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    def of_pictures(self, pixels):
        assert pixels.dtype == np.uint8
        angles = np.deg2rad(pixels[:, 0, 0, 0].astype(float))
        return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_clip_score():
    """Angles of 0, 60 and 120 degrees: what is behind counts as nothing, not as less."""
    scorer = ClipScore(Clip())
    images = np.full((3, 2, 2, 1), 60 / 127.5 - 1, np.float32)
    texts = ["60", "0", "180"]
    rows = scorer.rows(images, texts)
    np.testing.assert_allclose(rows["cos"], [1, 0.5, -0.5], atol=1e-6)
    found = scorer.metrics(rows, texts)
    assert found == pytest.approx({"clip_score": 50.0, "clip_s": 1.25})
    assert scorer.note["fingerprint"] == "0123" and "2.5" in scorer.note["clip_s"]
    scorer.rows(images, ["0", "0", "0"])
    assert scorer._clip.texts[-1] == ["0"]  # each text once


def test_what_applies():
    def names(shape, texts, clip=None):
        return list(chosen_scorers(Wanted(None, shape, texts, clip)))

    assert list(SCORERS) == ["clip", "digits", "pairs"]
    assert names((8, 8, 1), ["a seven", "3"]) == ["digits"]
    assert names((8, 8, 1), ["a seven", "a fox"]) == names((16, 16, 3), ["a seven"]) == []
    assert names((16, 16, 3), ["a fox"], Clip()) == ["clip"]
