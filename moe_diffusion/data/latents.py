"""A folder of prepared latents: its manifest, its records, and the source that reads it.

The folder holds `manifest.json` and ArrayRecord shards. A record is the fields of the condition,
in the order of the manifest's "fields", and then the latent: fp16 [F, h, w, k], unscaled. F is 2
if the mirrored image was encoded too, else 1. k is 2c for the moments of the autoencoder's Gaussian
(mean, log variance), and c for a sample. All numbers are little-endian and packed without gaps.

Format 1 of the manifest had no "fields": its records hold one int32 label, as `read_settings` says.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError, first_line

MANIFEST = "manifest.json"
UNFINISHED = "prepare.json"  # settings of a run that has not ended; the manifest repeats them
FORMAT = 2
_READER_OPTIONS = "readahead_buffer_size:0"


@dataclasses.dataclass(frozen=True)
class Record:
    """How one record is laid out.

    Attributes:
      shape: (h, w, c) of a latent.
      moments: whether mean and log variance are stored, or else one sample.
      flip: whether the latent of the mirrored image is stored, too.
      fields: of the condition, in the order in which they are stored.
    """

    shape: tuple[int, int, int]
    moments: bool
    flip: bool
    fields: dict[str, Field]

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Record:
        """The layout that a manifest, or the settings of a run of `prepare`, describes."""
        fields = {
            f["name"]: Field(tuple(f["shape"]), f["dtype"], f["num_values"])
            for f in settings["fields"]
        }
        return cls(tuple(settings["shape"]), settings["moments"], settings["flip"], fields)

    @property
    def array_shape(self) -> tuple[int, int, int, int]:
        """(F, h, w, k) of the stored numbers."""
        height, width, channels = self.shape
        return 1 + self.flip, height, width, channels * (1 + self.moments)

    @property
    def layout(self) -> np.dtype:
        """One record as a structured dtype of numpy; the latent is called "image"."""
        fields = [(name, field.dtype, field.shape) for name, field in self.fields.items()]
        return np.dtype([*fields, ("image", "<f2", self.array_shape)])

    def pack(self, latent: np.ndarray, cond: dict[str, Any]) -> bytes:
        """A latent [F, h, w, k] and its condition as the bytes of one record."""
        row = (*(cond[name] for name in self.fields), latent)
        return np.array(row, self.layout).tobytes()

    def unpack(self, records: list[bytes]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """B records as latents f16[B, F, h, w, k] and the condition {field: [B, ...]}."""
        table = np.frombuffer(b"".join(records), self.layout).reshape(len(records))
        cond = {name: np.ascontiguousarray(table[name]) for name in self.fields}
        return np.ascontiguousarray(table["image"]), cond


def describe_fields(spec: dict[str, Field]) -> list[dict[str, Any]]:
    """The entry "fields" of a manifest, see `Record.of`."""
    return [{"name": n, **field._asdict(), "shape": list(field.shape)} for n, field in spec.items()]


def read_settings(path: Path) -> dict[str, Any]:
    """A manifest, or the settings of an unfinished run. Both have "fields", also in format 1.

    Raises:
      UserError: the file is no JSON object.
    """
    try:
        settings = json.loads(path.read_text())
        label = Field((), "int32", settings.get("num_classes"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): prepare the folder again") from None
    return {"fields": describe_fields({"label": label}), **settings}


class Latents:
    """The source of a prepared folder.

    `take` returns the means (or the stored samples) as the model sees them, (z - shift) * scale,
    and never mirrors. A training batch is made by `take_stored` and `draw`.
    """

    def __init__(self, folder: str):
        self.manifest = read_manifest(folder)
        self.record = Record.of(self.manifest)
        self.image_shape, self.cond_spec = self.record.shape, self.record.fields
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
        """{"image": f32[B, h, w, c], **cond} of the records `indices`."""
        batch = self.take_stored(indices)
        mean = batch["image"][:, 0, ..., : self.image_shape[-1]].astype(np.float32)
        return {**batch, "image": (mean - self._shift) * self._scale}

    def take_stored(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": f16[B, F, h, w, k] as stored, **cond} of the records `indices`."""
        indices = np.asarray(indices)
        shards = np.searchsorted(self._ends, indices, side="right")
        records: list[bytes] = [b""] * len(indices)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            found = self._read(int(shard), (indices[places] - first).tolist())
            for place, record in zip(places.tolist(), found, strict=True):
                records[place] = record
        stored, cond = self.record.unpack(records)
        return {"image": stored, **cond}

    def draw(self, stored: np.ndarray, positions: range, seed: int, flip: bool) -> np.ndarray:
        """Draws the latents of a training batch.

        A draw chooses one of the two images (if `flip`) and a sample of the Gaussian (if moments
        are stored). It is a function of the seed and of the record's position in the global batch,
        so a process need not draw for the others.

        Args:
          stored: f16[B, F, h, w, k].
          positions: of the B records in the global batch.
          seed: of this batch.
          flip: whether to choose between the image and its mirror image.

        Returns:
          f32[B, h, w, c], scaled.
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

    def _read(self, shard: int, indices: list[int]) -> list[bytes]:
        path = self._folder / self._files[shard]
        try:
            if shard not in self._readers:
                reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
                self._readers[shard] = reader
            return self._readers[shard].read(indices)
        except (RuntimeError, IndexError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}): delete the folder and prepare it again"
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
    """The manifest of a finished folder, with "fields" whatever its format.

    Raises:
      UserError: the folder is not finished, or its manifest is damaged or of a later format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if (Path(folder) / UNFINISHED).is_file():
            raise UserError(f"{folder} is half prepared: run the same `prepare` command again")
        raise UserError(f"{folder} holds no prepared latents (it has no {MANIFEST})")
    manifest = read_settings(path)
    number = manifest.get("format")
    if not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise UserError(
            f"{path} is of format {number!r}, this version of moe_diffusion reads 1 to {FORMAT}: "
            "update moe_diffusion, or prepare the folder again"
        )
    counted = sum(shard["count"] for shard in manifest["shards"])
    if counted != manifest["count"]:
        raise UserError(
            f"{path} says {manifest['count']} records, its shards hold {counted}: prepare the "
            "folder again"
        )
    return manifest
