"""A folder of prepared latents: its manifest, its records, and the source that reads it.

The folder holds `manifest.json` and ArrayRecord shards. A record is an int32 label and fp16
numbers [F, h, w, k]: F = 2 where the mirrored image was encoded, too; k = 2c for the moments of
the autoencoder's Gaussian (mean, log variance), k = c for a sample. Both are unscaled.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moe_diffusion.errors import UserError

MANIFEST = "manifest.json"
UNFINISHED = "prepare.json"  # settings of a run that has not ended; then the manifest has them
FORMAT = 1
# Of the writer: every record by itself (random access), and fp16 noise does not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"


@dataclasses.dataclass(frozen=True)
class Record:
    """How one record is laid out."""

    shape: tuple[int, int, int]  # of a latent: h, w, c
    moments: bool
    flip: bool

    @property
    def array_shape(self) -> tuple[int, int, int, int]:
        height, width, channels = self.shape
        return 1 + self.flip, height, width, channels * (1 + self.moments)

    @property
    def num_bytes(self) -> int:
        return 4 + 2 * int(np.prod(self.array_shape))

    def pack(self, latent: np.ndarray, label: int) -> bytes:
        return np.int32(label).tobytes() + latent.astype("<f2").tobytes()

    def unpack(self, records: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """f16[B, F, h, w, k] and labels i32[B]."""
        table = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self.num_bytes)
        labels = np.ascontiguousarray(table[:, :4]).view("<i4")[:, 0]
        latents = np.ascontiguousarray(table[:, 4:]).view("<f2")
        return latents.reshape(len(records), *self.array_shape), labels


class Latents:
    """The source of a prepared folder.

    `take` gives the means (or stored samples) as the model sees them, (z - shift) * scale, never
    mirrored; training batches are `take_stored` followed by `draw`.
    """

    def __init__(self, folder: str):
        self.manifest = read_manifest(folder)
        self.record = Record(
            tuple(self.manifest["shape"]), self.manifest["moments"], self.manifest["flip"]
        )
        self.image_shape = self.record.shape
        self.num_classes = self.manifest["num_classes"]
        self._scale, self._shift = self.manifest["scale"], self.manifest["shift"]
        self._folder = Path(folder)
        self._files = [shard["file"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        self._readers: dict[int, Any] = {}
        for shard in self.manifest["shards"]:
            self._check_shard(shard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.take(np.array([index])).items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}  # a worker process opens its own

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        stored = self.take_stored(indices)
        mean = stored["stored"][:, 0, ..., : self.image_shape[-1]].astype(np.float32)
        return {"image": (mean - self._shift) * self._scale, "label": stored["label"]}

    def take_stored(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"stored": f16[B, F, h, w, k], "label": i32[B]}."""
        indices = np.asarray(indices)
        shards = np.searchsorted(self._ends, indices, side="right")
        records: list[bytes] = [b""] * len(indices)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            found = self._read(int(shard), (indices[places] - first).tolist())
            for place, record in zip(places.tolist(), found, strict=True):
                records[place] = record
        stored, labels = self.record.unpack(records)
        return {"stored": stored, "label": labels}

    def draw(self, stored: np.ndarray, positions: range, seed: int, flip: bool) -> np.ndarray:
        """Latents f32[B, h, w, c] for training, from f16[B, F, h, w, k].

        Which of the two images (if `flip`) and, of moments, which sample, is a function of the
        seed and a record's position in the global batch: processes need not draw for each other.
        """
        channels = self.image_shape[-1]
        image = np.empty((len(stored), *self.image_shape), np.float32)
        for i, position in enumerate(positions):
            rng = np.random.Generator(np.random.Philox(key=[seed, position]))
            latent = stored[i, int(rng.random() < 0.5) if flip else 0].astype(np.float32)
            if self.record.moments:
                noise = rng.standard_normal(self.image_shape, np.float32)
                latent = latent[..., :channels] + np.exp(0.5 * latent[..., channels:]) * noise
            image[i] = latent
        return (image - np.float32(self._shift)) * np.float32(self._scale)

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            path = self._folder / self._files[shard]
            self._readers[shard] = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
        return self._readers[shard]

    def _read(self, shard: int, indices: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(indices)
        except (RuntimeError, IndexError, ValueError) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise UserError(
                f"{self._folder / self._files[shard]} is damaged ({reason}): delete the folder "
                "and prepare it again"
            ) from None

    def _check_shard(self, shard: dict[str, Any]) -> None:
        """Raises a UserError unless the file is as long as when it was written."""
        path = self._folder / shard["file"]
        size = path.stat().st_size if path.is_file() else "no"
        if size != shard["bytes"]:
            raise UserError(
                f"{path} has {size} bytes where {MANIFEST} says {shard['bytes']}: copy the folder "
                "again, or delete it and prepare it again"
            )


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a finished folder. Raises a UserError where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if (Path(folder) / UNFINISHED).is_file():
            raise UserError(f"{folder} is half prepared: run the same `prepare` command again")
        raise UserError(f"{folder} holds no prepared latents (it has no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): prepare the folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}: prepare the folder again")
    counted = sum(shard["count"] for shard in manifest["shards"])
    if counted != manifest["count"]:
        raise UserError(
            f"{path} says {manifest['count']} records, its shards hold {counted}: prepare the "
            "folder again"
        )
    return manifest
