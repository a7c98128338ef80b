"""A prepared folder with known records, written without an autoencoder."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moe_diffusion.conditions import Field
from moe_diffusion.data.latents import Latents, describe_fields
from moe_diffusion.preparing import encode

CHANNELS = 2
COUNT = 21  # shards of 8, 8 and 5; batches of 4, 4 and 4, 1


class Images:
    """Image i has the value i / 100 on its left half and -i / 100 on its right."""

    shape = (8, 8, 1)
    cond_spec = {"label": Field((), "int32", 3)}

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken, self.reads = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        self.reads += 1
        if index in self.broken:
            return None
        image = np.full(self.shape, index / 100, np.float32)
        image[:, self.shape[1] // 2 :] *= -1
        return {"image": image, **self.cond(index)}

    def cond(self, index: int) -> dict[str, np.ndarray]:
        return {"label": np.int32(index % 3)}

    def name(self, index: int) -> str:
        return f"image {index}"


class Prompts(Images):
    """Images that are not square, with a text-like condition of several fields."""

    shape = (8, 12, 1)
    cond_spec = {
        "text": Field((5, 3), "bfloat16"),
        "text_mask": Field((5,), "bool"),
        "tokens": Field((2,), "int16", 7),
        "guidance": Field((), "float32"),
    }

    def cond(self, index: int) -> dict[str, np.ndarray]:
        return {
            "text": np.random.default_rng(index).standard_normal((5, 3)).astype("bfloat16"),
            "text_mask": np.arange(5) <= index % 5,
            "tokens": np.array([index % 7, 6], np.int16),
            "guidance": np.float32(index / 3),
        }


def moments(images: np.ndarray) -> np.ndarray:
    """Channel 0 is the mean of 2x2 pixels, channel 1 is 1 minus it; variance 0.01."""
    height, width = images.shape[1] // 2, images.shape[2] // 2
    mean = images.reshape(len(images), height, 2, width, 2).mean((2, 4))
    return np.stack([mean, 1 - mean, *2 * [np.full_like(mean, np.log(0.01))]], axis=-1)


def job(folder: Path, images: Images, **settings: Any) -> encode.Job:
    settings = {
        "shape": [images.shape[0] // 2, images.shape[1] // 2, CHANNELS],
        "moments": True,
        "flip": False,
        "seed": 0,
        "scale": 0.5,
        "shift": 0.25,
        "shard_size": 8,
        "fields": describe_fields(images.cond_spec),
        "autoencoder": {"name": "means", "fingerprint": "0" * 16},
    } | settings
    return encode.Job(images, moments, 4, folder, settings, 2)


def write(folder: Path, images: Images, **settings: Any) -> Latents:
    prepared = job(folder, images, **settings)
    assert encode.begin(prepared)
    encode.write_shards(prepared, 0, 1)
    encode.finish(prepared)
    return Latents(str(folder))


def means(indices: Sequence[int]) -> np.ndarray:
    """The scaled latents of some `Images`, as `write` leaves them."""
    image = np.stack([Images(COUNT).read(i)["image"] for i in indices])
    return (moments(image)[..., :CHANNELS] - 0.25) * 0.5


def write_format_1(folder: Path) -> None:
    """A folder as it was written before records had fields, byte by byte; 5 samples of 2x3x1."""
    folder.mkdir()
    shard = folder / "latents-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for i in range(5):
        writer.write(struct.pack("<i6e", i % 3, *(i + j / 8 for j in range(6))))
    writer.close()
    manifest = {
        "format": 1,
        "count": 5,
        "source": "folder:/pictures",
        "num_classes": 3,
        "image_size": 16,
        "shape": [2, 3, 1],
        "moments": False,
        "flip": False,
        "seed": 0,
        "scale": 0.5,
        "shift": 1.0,
        "shard_size": 8,
        "shards": [{"file": shard.name, "count": 5, "bytes": shard.stat().st_size}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
