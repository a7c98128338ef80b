"""What judges images for prompts: a registry of scorers, each chosen by what is asked.

A scorer sees batch after batch and returns rows, one an image, which are kept on disk; of all rows
it makes metrics. So an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.digit_pairs import pair_of
from moe_diffusion.digit_prompts import digit_of
from moe_diffusion.evaluation.digits import DigitsJudge
from moe_diffusion.evaluation.features import Extractor, FeatureSet
from moe_diffusion.evaluation.images import to_pixels
from moe_diffusion.evaluation.metrics import chosen, gaussian_of
from moe_diffusion.models.clip import CLIPEncoder

HESSEL = 2.5  # w of CLIPScore (Hessel et al., 2104.08718)
_DIGIT, _PAIR = (8, 8, 1), (8, 16, 1)

Rows = Mapping[str, np.ndarray]


class Wanted(NamedTuple):
    """What a scorer may go by.

    Attributes:
      config: of the run.
      shape: (H, W, C) of its images.
      texts: the prompt of every image.
      clip: a CLIP, or None.
    """

    config: ConfigDict
    shape: tuple[int, int, int]
    texts: Sequence[str]
    clip: CLIPEncoder | None = None


class Scorer(Protocol):
    """Judges images for prompts.

    Attributes:
      note: what it is and how it judges, for the result.
    """

    note: dict[str, Any]

    def rows(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Images f32[b, H, W, C] in [-1, 1] but for overshoot -> {name: [b, ...]}."""
        ...

    def metrics(self, rows: Rows, texts: Sequence[str]) -> dict[str, float]:
        """The rows of all images, in their order -> name of a metric -> its value."""
        ...


class ClipScore:
    """How near, in a CLIP, an image is to its prompt as it stands, without words before it.

    Metrics, where cos is of the angle between the two vectors, not below 0:
      clip_score: mean of 100 cos, which most papers and torchmetrics call CLIP score.
      clip_s: mean of 2.5 cos, CLIPScore as its authors define it (2104.08718). They also write "A
        photo depicts" before a text, which is not done here.
    """

    def __init__(self, clip: CLIPEncoder):
        self._clip = clip
        self.note = {
            "name": clip.name,
            "fingerprint": clip.fingerprint,
            "dtype": str(np.dtype(clip.network.dtype)),
            "clip_score": "mean of 100 max(cos, 0)",
            "clip_s": f"mean of {HESSEL} max(cos, 0)",
        }

    def rows(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        once = list(dict.fromkeys(texts))
        vectors = dict(zip(once, self._clip.of_texts(once), strict=True))
        pixels = to_pixels(images, "round").astype(np.uint8)
        pictures = self._clip.of_pictures(pixels)
        return {"cos": (pictures * np.stack([vectors[text] for text in texts])).sum(-1)}

    def metrics(self, rows: Rows, texts: Sequence[str]) -> dict[str, float]:
        mean = float(np.maximum(rows["cos"].astype(np.float64), 0).mean())
        return {"clip_score": 100 * mean, "clip_s": HESSEL * mean}


class PromptedDigit:
    """Whether an image shows the digit that its prompt asks for; see `digits.DigitsJudge`."""

    note = {"judge": "support vector machine on the training digits"}

    def rows(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"images": np.asarray(images, np.float32)}

    def metrics(self, rows: Rows, texts: Sequence[str]) -> dict[str, float]:
        digits = np.array([int(digit_of(text)) for text in texts])
        found = DigitsJudge().score(rows["images"], digits)
        return {"prompt_accuracy": found.pop("class_accuracy"), **found}


class PromptedPair:
    """Whether an image shows the two digits that its prompt asks for, each in its place.

    Metrics, shares of all images or digits; see `digits.DigitsJudge`:
      prompt_accuracy: of images with both digits right and in their places.
      content_accuracy: of images with the right two digits in any order.
      digits_accuracy: of single digits that are right and in their places.
      classifier_accuracy: of real held-out digits that the judge knows.
    """

    note = {"judge": "support vector machine on the training digits, for each half of the image"}

    def rows(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"images": np.asarray(images, np.float32)}

    def metrics(self, rows: Rows, texts: Sequence[str]) -> dict[str, float]:
        judge = DigitsJudge()
        shown = np.stack([judge.classify(h) for h in np.split(rows["images"], 2, axis=2)], axis=1)
        asked = np.array([pair_of(text) for text in texts])
        right = shown == asked
        return {
            "prompt_accuracy": float(right.all(1).mean()),
            "content_accuracy": float((np.sort(shown) == np.sort(asked)).all(1).mean()),
            "digits_accuracy": float(right.mean()),
            "classifier_accuracy": judge.classifier_accuracy,
        }


def _clip_score(wanted: Wanted) -> Scorer | None:
    return ClipScore(wanted.clip) if wanted.clip else None


def _prompted_digit(wanted: Wanted) -> Scorer | None:
    fits = wanted.shape == _DIGIT and all(map(digit_of, wanted.texts))
    return PromptedDigit() if fits else None


def _prompted_pair(wanted: Wanted) -> Scorer | None:
    fits = wanted.shape == _PAIR and all(map(pair_of, wanted.texts))
    return PromptedPair() if fits else None


# Name -> what makes the scorer, or None where it does not apply. The name is also the key of its
# note in a result.
SCORERS: dict[str, Callable[[Wanted], Scorer | None]] = {
    "clip": _clip_score,
    "digits": _prompted_digit,
    "pairs": _prompted_pair,
}


def chosen_scorers(wanted: Wanted) -> dict[str, Scorer]:
    """The scorers that apply."""
    made = {name: make(wanted) for name, make in SCORERS.items()}
    return {name: scorer for name, scorer in made.items() if scorer}


class FeatureRows:
    """The features of an extractor as rows, for FID and its like."""

    def __init__(self, extractor: Extractor, name: str):
        self.note, self._extractor, self._name = extractor.note, extractor, name

    def rows(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return self._extractor(images)

    def features(self, rows: Rows, most: int) -> FeatureSet:
        """The set of all images, with at most so many vectors.

        Raises:
          UserError: a feature is not finite, or there are too few.
        """
        gaussians = {kind: gaussian_of(rows[kind]) for kind in rows}
        kept = np.asarray(rows["pool"][chosen(len(rows["pool"]), most)], np.float32)
        return FeatureSet(self._name, gaussians["pool"], gaussians.get("spatial"), kept)
