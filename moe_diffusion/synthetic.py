"""Made-up images with made-up conditions, for tests, benchmarks and machines without data."""

from __future__ import annotations

import numpy as np

from moe_diffusion.conditions import Field

Shape = tuple[int, int, int]  # (H, W, C)


class Synthetic:
    """Endless supply of images for tests, benchmarks and machines without data; stores nothing.

    Record i is a pure function of i, so every process makes the same record. Both splits are the
    same records. Image i is a plane wave: its class, which is i modulo the number of classes, fixes
    the direction and the colours; a hash of i fixes the phase and the strength. So a model can
    learn the classes.

    The condition has every field of `cond_spec`, so any model can be tried out. With j the position
    inside the field: integers are (i + j) modulo `num_values`; a mask is true for the first
    1 + i mod L of its L places along the last axis; floats are a hash of (i, j), uniform with mean
    0 and variance 1. The number of classes is the `num_values` of the first field that has one.
    """

    def __init__(self, image_shape: Shape, cond_spec: dict[str, Field], size: int = 65_536):
        self.image_shape, self.cond_spec, self._size = tuple(image_shape), dict(cond_spec), size
        self._classes = next((f.num_values for f in cond_spec.values() if f.num_values), 10)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        fields = enumerate(self.cond_spec.items(), 1)
        cond = {name: _made_up(field, indices, number) for number, (name, field) in fields}
        return {"image": self._images(indices), **cond}

    def _images(self, indices: np.ndarray) -> np.ndarray:
        """f32[B, H, W, C]."""
        height, width, channels = self.image_shape
        classes = indices % self._classes
        phase, strength = hashed_uniform(indices, 2)[..., None, None]
        colours = 1 - 2 * hashed_uniform(classes, channels + 1)[1:].T[:, None, None, :]
        rows = np.arange(height)[None, :, None] * (classes % 4)[:, None, None] / height
        columns = np.arange(width)[None, None, :] * (classes // 4 % 4)[:, None, None] / width
        # The addition theorem of cos(a + b) needs cosines of H + W angles an image, not of H * W.
        a, b = 2 * np.pi * (rows + phase), 2 * np.pi * columns
        wave = (np.cos(a) * np.cos(b) - np.sin(a) * np.sin(b)) * (0.5 + 0.5 * strength)
        return wave.astype(np.float32)[..., None] * colours.astype(np.float32)


def _made_up(field: Field, indices: np.ndarray, number: int) -> np.ndarray:
    """The values [B, *shape] of field `number` (1, 2, ...) in records i64[B]; see `Synthetic`."""
    dtype, size = np.dtype(field.dtype), int(np.prod(field.shape))
    if dtype.kind == "b":
        length = field.shape[-1] if field.shape else 1
        values = np.arange(size) % length <= indices[:, None] % length
    elif dtype.kind in "iu":
        values = (indices[:, None] + np.arange(size)) % (field.num_values or 128)
    else:
        values = (2 * hashed_uniform(indices + (number << 32), size).T - 1) * 3**0.5
    return values.reshape(len(indices), *field.shape).astype(dtype)


def hashed_uniform(numbers: np.ndarray, count: int) -> np.ndarray:
    """f64[count, N] uniform in [0, 1), a pure function of each number (SplitMix64's mixer)."""
    streams = np.arange(1, count + 1, dtype=np.uint64)[:, None] << np.uint64(40)
    z = (numbers.astype(np.uint64) + streams) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
