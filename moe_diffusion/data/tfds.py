"""Images of a dataset that TensorFlow Datasets has prepared as array_record.

Reading needs no TensorFlow. docs/data.md has the command that prepares ImageNet once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_diffusion import pictures
from moe_diffusion.conditions import Field
from moe_diffusion.data.images import to_array
from moe_diffusion.errors import UserError, explained


class TfdsImages:
    """`tfds:<name>`, like imagenet2012:5.1.0, or `tfds:<folder of a prepared version>`.

    A name is looked up in $TFDS_DATA_DIR, or in ~/tensorflow_datasets where that is not set. The
    dataset must have the features "image" and "label".
    """

    def __init__(self, place: str, split: str, image_shape: tuple[int, int, int]):
        features, self._records = open_records(place, split, "label")
        self._place, self.image_shape = place, image_shape
        self.cond_spec = {"label": Field((), "int32", features["label"].num_classes)}
        self.class_names = list(features["label"].names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record, name = self._records[index], f"record {index} of tfds:{self._place}"
        read = pictures.read if isinstance(record["image"], bytes) else pictures.from_array
        image = read(record["image"], name, "prepare the dataset again")
        return {"image": to_array(image, self.image_shape), "label": np.int32(record["label"])}

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture of record `index`."""
        picture, name = self._records[index]["image"], f"record {index} of tfds:{self._place}"
        return pictures.size_of(picture, name, "prepare the dataset again")


def open_records(place: str, split: str, needed: str) -> tuple[Any, Any]:
    """(features, records) of a prepared dataset; the images of its records stay files.

    Args:
      place: a name or a folder, see `TfdsImages`.
      needed: a feature that must be there beside "image".

    Raises:
      UserError: it is not prepared, or has no such split or feature.
    """
    builder = _builder(place)
    features, splits = builder.info.features, list(builder.info.splits)
    if not {"image", needed} <= set(features):
        found = ", ".join(features)
        raise UserError(f"tfds:{place} has the features {found}: it needs image and {needed}")
    if splits and split not in splits:
        known = ", ".join(splits)
        raise UserError(f"data.split={split!r} is not in tfds:{place}; it has {known}")
    remedy = "prepare it with file_format=array_record, see docs/data.md"
    # Here and in `_builder` tfds raises many kinds: AssertionError, OSError, some of its own.
    with explained(f"tfds:{place} cannot be read", remedy):
        from tensorflow_datasets import decode

        # What tfds makes of images depends on the packages installed.
        decoders = {"image": decode.SkipDecoding()}
        return features, builder.as_data_source(split=split, decoders=decoders)


def _builder(place: str) -> Any:
    with explained(f"tfds:{place} needs another package", "pip install 'moe_diffusion[tfds]'"):
        import tensorflow_datasets as tfds
    with explained(f"tfds:{place} is no prepared dataset", "see docs/data.md"):
        if (Path(place) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(place)
        return tfds.builder(place)
