"""A prepared folder with known records, written without an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_diffusion.data import encode
from moe_diffusion.data.latents import Latents

SIDE, CHANNELS = 4, 2


class Images:
    """Image i has the value i / 100 on its left half and -i / 100 on its right."""

    num_classes = 3

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken, self.reads = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        self.reads += 1
        if index in self.broken:
            return None
        image = np.full((8, 8, 1), index / 100, np.float32)
        image[:, 4:] *= -1
        return {"image": image, "label": np.int32(index % 3)}

    def name(self, index: int) -> str:
        return f"image {index}"


def moments(images: np.ndarray) -> np.ndarray:
    """Channel 0 is the mean of 2x2 pixels, channel 1 is 1 minus it; variance 0.01."""
    mean = images.reshape(len(images), SIDE, 2, SIDE, 2).mean((2, 4))
    return np.stack([mean, 1 - mean, *2 * [np.full_like(mean, np.log(0.01))]], axis=-1)


def job(folder: Path, images: Images, **settings: Any) -> encode.Job:
    settings = {
        "shape": [SIDE, SIDE, CHANNELS],
        "moments": True,
        "flip": False,
        "seed": 0,
        "scale": 0.5,
        "shift": 0.25,
        "shard_size": 8,
        "num_classes": 3,
        "autoencoder": {"name": "means", "fingerprint": "0" * 16},
    } | settings
    return encode.Job(images, moments, 4, folder, settings, 2)


def write(folder: Path, images: Images, **settings: Any) -> Latents:
    prepared = job(folder, images, **settings)
    assert encode.begin(prepared)
    encode.write_shards(prepared, 0, 1)
    encode.finish(prepared)
    return Latents(str(folder))
