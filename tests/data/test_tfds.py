"""Datasets prepared by TensorFlow Datasets, written and read without TensorFlow."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moe_diffusion.conditions import Field
from moe_diffusion.data import images, sources
from moe_diffusion.errors import UserError

SIZES = {"train": 7, "validation": 3}


def picture(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8))


class Pets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "fish"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {split: self._generate_examples(size) for split, size in SIZES.items()}

    def _generate_examples(self, size):
        for i in range(size):
            file = io.BytesIO()
            picture(i).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Pets(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "pets" / "1.0.0"


def test_records_of_a_prepared_folder(prepared):
    for split, size in SIZES.items():
        source = sources.open_images(f"tfds:{prepared}", (8, 8, 3), split=split)
        assert len(source) == size and source.image_shape == (8, 8, 3)
        assert source.cond_spec["label"].num_values == 3 and source.class_names == [
            "cat",
            "dog",
            "fish",
        ]
        records = [source[i] for i in range(size)]
        assert sorted(int(r["label"]) for r in records) == sorted(i % 3 for i in range(size))
        expected = {images.to_array(picture(i), (8, 8, 3)).tobytes(): i % 3 for i in range(size)}
        assert {r["image"].tobytes(): int(r["label"]) for r in records} == expected
    assert "tensorflow" not in sys.modules


def test_a_dataset_by_name():
    with tfds.testing.mock_data(num_examples=5):
        source = sources.open_images("tfds:mnist", (28, 28, 1), split="test")
        assert len(source) == 5 and source.cond_spec == {"label": Field((), "int32", 10)}
        record = source[4]
    assert record["image"].shape == (28, 28, 1) and record["image"].dtype == np.float32
    assert 0 <= record["label"] < 10


def test_what_is_not_prepared_is_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for place, split, message in (
        (prepared, "test", "data.split='test' is not in tfds:.*; it has train, validation"),
        ("imagenet3000", "train", "tfds:imagenet3000 is no prepared dataset"),
        ("mnist", "train", "tfds:mnist cannot be read .* prepare it with file_format=array_record"),
        (tmp_path, "train", "is no prepared dataset"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_images(f"tfds:{place}", (8, 8, 3), split=split)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'moe_diffusion\[tfds\]'"):
        sources.open_images(f"tfds:{prepared}", (8, 8, 3))
