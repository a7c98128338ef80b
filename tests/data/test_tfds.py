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


def test_a_dataset_by_name(prepared, monkeypatch):
    # tfds read $TFDS_DATA_DIR when it was imported.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared.parents[1]))
    source = sources.open_images("tfds:pets:1.0.0", (28, 20, 1), split="validation")
    assert len(source) == 3 and source.cond_spec == {"label": Field((), "int32", 3)}
    record = source[2]
    assert record["image"].shape == (28, 20, 1) and record["image"].dtype == np.float32
    assert 0 <= record["label"] < 3


class Scans(tfds.core.GeneratorBasedBuilder):
    """The files of one picture: plain, on its side, of 16 bits; and one that is cut off."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        pixels, exif = GREY, Image.Exif()
        exif[274] = 6  # the 0th row is the right side: np.rot90 turned it to the left
        turned, wide = np.rot90(pixels), pixels.astype(np.uint16) * 257
        for i, (array, options) in enumerate(((pixels, {}), (turned, {"exif": exif}), (wide, {}))):
            file = io.BytesIO()
            Image.fromarray(array).save(file, "png", **options)
            file.seek(0)
            yield i, {"image": file, "label": 0}
        yield 3, {"image": io.BytesIO(file.getvalue()[:45]), "label": 1}


GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def test_pictures_mean_what_they_mean_in_folders(tmp_path):
    Scans(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = sources.open_images(f"tfds:{tmp_path / 'scans' / '1.0.0'}", (6, 8, 1))
    records = {}
    for i in range(4):
        try:
            record = source[i]
        except UserError as error:
            assert f"record {i} of tfds:{tmp_path}/scans/1.0.0 cannot be read" in str(error)
        else:
            records[i] = record
    assert len(records) == 3
    assert {source.picture_size(i) for i in records} == {(6, 8)}
    for record in records.values():
        np.testing.assert_array_equal(record["image"][..., 0], GREY / np.float32(127.5) - 1)


def test_arrays_that_are_no_files(prepared):
    """A feature that is a tensor comes as an array."""
    source = sources.open_images(f"tfds:{prepared}", (6, 8, 1))
    source._records = [{"image": GREY[..., None], "label": 1}]
    record = source[0]
    assert source.picture_size(0) == (6, 8)
    np.testing.assert_array_equal(record["image"][..., 0], GREY / np.float32(127.5) - 1)
    source._records = [{"image": GREY.astype(np.float32), "label": 1}]
    with pytest.raises(UserError, match="record 0 of tfds:.* mode F means white"):
        source[0]


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
