"""A data set with captions for TensorFlow Datasets, written and read without TensorFlow."""

from __future__ import annotations

import io

import numpy as np
import tensorflow_datasets as tfds

from tests.preparing.caption_places import TEXTS, picture


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Two images with a caption and a list of captions; one of the captions is empty."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": text,
            "captions": tfds.features.Sequence({"text": text, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(2):
            several = [{"text": f"{text} {i}", "id": 0} for text in TEXTS[:2]]
            file = io.BytesIO(picture(i))
            yield i, {"image": file, "caption": "" if i else TEXTS[3], "captions": several}
