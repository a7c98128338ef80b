"""A folder of prepared latents: its manifest, its records, and the source that reads it.

The folder holds `manifest.json` and ArrayRecord shards. A record is the fields of the condition,
in the order of the manifest's "fields", and then the latent: fp16 [F, h, w, k], unscaled. F is 2
if the mirrored image was encoded too, else 1. k is 2c for the moments of the autoencoder's Gaussian
(mean, log variance), and c for a sample. All numbers are little-endian and packed without gaps.
If the manifest has "buckets", the shapes of latents of several sizes, each shard names its bucket,
and the shards of the first bucket come first.

Damage is noticed when a record is read, because ArrayRecord stores a hash of each. The manifest has
a digest of itself, and one of every shard for `prepare --verify`, which also finds the shards of
another folder. Reading hundreds of GB at every start for these would cost minutes.

Format 1 of the manifest had no "fields": its records hold one int32 label, as `read_settings` says.
Format 2 had no digests. Format 3 had one size, one caption a record and no empty prompt; see
`caption_records`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moe_diffusion.caption_records import draw_captions, first_captions, read_null, stored_spec
from moe_diffusion.conditions import IMAGE, Field
from moe_diffusion.errors import UserError, explained
from moe_diffusion.manifest import MANIFEST, REMEDY, check_manifest, check_settings
from moe_diffusion.reading import read_table

UNFINISHED = "prepare.json"  # settings of a run that has not ended; the manifest repeats them
_DAMAGED = RuntimeError, IndexError, ValueError
_READER_OPTIONS = "readahead_buffer_size:0"


def describe_fields(spec: dict[str, Field]) -> list[dict[str, Any]]:
    """The entry "fields" of a manifest; `spec_of` reads it."""
    return [{"name": n, **field._asdict(), "shape": list(field.shape)} for n, field in spec.items()]


def spec_of(settings: dict[str, Any]) -> dict[str, Field]:
    """The fields of the condition, in the order in which a record holds them."""
    fields = settings["fields"]
    return {f["name"]: Field(tuple(f["shape"]), f["dtype"], f["num_values"]) for f in fields}


def shapes_of(settings: dict[str, Any]) -> list[tuple[int, ...]]:
    """(h, w, c) of the latents of each bucket of a manifest, or of settings of `prepare`."""
    return [tuple(shape) for shape in settings.get("buckets") or [settings["shape"]]]


def record_of(settings: dict[str, Any], bucket: int = 0) -> np.dtype:
    """One record as a structured dtype of numpy.

    Args:
      settings: a manifest, or the settings of a run of `prepare`; reads "fields", the shape of a
        latent, "moments" (whether mean and log variance are stored, or else one sample) and "flip"
        (whether the latent of the mirrored image is stored, too).
      bucket: of the record.

    Returns:
      A dtype of the fields of the condition and then "image", the latent [F, h, w, k].
    """
    height, width, channels = shapes_of(settings)[bucket]
    latent = 1 + settings["flip"], height, width, channels * (1 + settings["moments"])
    spec = stored_spec(spec_of(settings), settings)
    fields = [(name, field.dtype, field.shape) for name, field in spec.items()]
    return np.dtype([*fields, (IMAGE, "<f2", latent)])


def read_settings(path: Path) -> dict[str, Any]:
    """A manifest, or the settings of an unfinished run. Both have "fields", also in format 1.

    Raises:
      UserError: the file is no JSON object, of a later format, or one of its values cannot be.
    """
    settings = read_table(path, REMEDY)
    if "num_classes" in settings:
        label = Field((), "int32", settings["num_classes"])
        settings.setdefault("fields", describe_fields({"label": label}))
    check = check_manifest if path.name == MANIFEST else check_settings
    check(settings, str(path))
    return settings


class Latents:
    """The source of a prepared folder.

    `take` returns the means (or the stored samples) as the model sees them, (z - shift) * scale,
    and never mirrors. A training batch is made by `take_stored` and `draw`. `mirrored` says whether
    the mirrored images are stored, too. What is taken together is of one of the `buckets`;
    `image_shape` is the shape of the first. Of several captions, `take` returns the first, and
    `draw_captions` chooses one. `null` has the fields of the empty prompt, {field: [*shape]}, or
    nothing. `text_encoders` says which encoder made which field (the manifest's "text").
    """

    def __init__(self, folder: str):
        self.manifest = read_manifest(folder)
        self.image_shape, self.cond_spec = tuple(self.manifest["shape"]), spec_of(self.manifest)
        self.stored_spec = stored_spec(self.cond_spec, self.manifest)
        self.null = read_null(folder, self.manifest, self.cond_spec)
        self.text_encoders = self.manifest.get("text") or {}
        self.class_names = self.manifest.get("class_names")
        self.class_counts = self.manifest.get("class_counts")
        self._scale, self._shift = self.manifest["scale"], self.manifest["shift"]
        shards, shapes = self.manifest["shards"], shapes_of(self.manifest)
        self._bucket_of = [shard.get("bucket", 0) for shard in shards]
        self._records = [record_of(self.manifest, bucket) for bucket in range(len(shapes))]
        counts = np.bincount(self._bucket_of, [shard["count"] for shard in shards], len(shapes))
        self.buckets = tuple(zip(shapes, counts.astype(int).tolist(), strict=True))
        self._files = [Path(folder) / shard["file"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["count"] for shard in shards)])[:-1]
        self.mirrored: bool = self.manifest["flip"]
        self._readers: dict[int, Any] = {}
        for path, shard in zip(self._files, shards, strict=True):
            size = path.stat().st_size if path.is_file() else "no"
            if size != shard["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes where {MANIFEST} says {shard['bytes']}: copy the "
                    "folder again, or delete it and prepare it again"
                )

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.take(np.array([index])).items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}  # a worker process opens its own

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": f32[B, h, w, c], **cond} of the records `indices`."""
        batch = first_captions(self.take_stored(indices), self.manifest)
        mean = batch["image"][:, 0, ..., : self.image_shape[-1]].astype(np.float32)
        return {**batch, "image": (mean - self._shift) * self._scale}

    def take_stored(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": f16[B, F, h, w, k] as stored, **cond} of the records `indices`."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        (bucket,) = {self._bucket_of[shard] for shard in shards}
        table = np.empty(len(indices), self._records[bucket])
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            records = self._read(shard, (indices[mine] - self._starts[shard]).tolist())
            table[mine] = np.frombuffer(b"".join(records), table.dtype)
        return {name: np.ascontiguousarray(table[name]) for name in table.dtype.names}

    def draw(self, stored: np.ndarray, positions: range, seed: int, flip: bool) -> np.ndarray:
        """Draws the latents of a training batch.

        A draw chooses one of the two images (if `flip`, and if both are stored) and a sample of the
        Gaussian (if moments are stored). It is a function of the seed and of the record's position
        in the global batch, so a process need not draw for the others.

        Args:
          stored: f16[B, F, h, w, k].
          positions: of the B records in the global batch.
          seed: of this batch.
          flip: whether to choose between the image and its mirror image.

        Returns:
          f32[B, h, w, c], scaled.
        """
        flip = flip and self.mirrored
        shape = (*stored.shape[2:4], self.image_shape[-1])
        image = np.empty((len(stored), *shape), np.float32)
        for i, position in enumerate(positions):
            rng = np.random.Generator(np.random.Philox(key=[seed, position]))
            latent = stored[i, int(rng.random() < 0.5) if flip else 0].astype(np.float32)
            if self.manifest["moments"]:
                mean, logvar = np.split(latent, 2, axis=-1)
                latent = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            image[i] = latent
        return (image - np.float32(self._shift)) * np.float32(self._scale)

    def draw_captions(self, batch: dict, positions: range, seed: int) -> dict[str, np.ndarray]:
        """A stored batch with one caption a record; see `caption_records.draw_captions`."""
        return draw_captions(batch, self.manifest, positions, seed)

    def _read(self, shard: int, indices: list[int]) -> list[bytes]:
        path = str(self._files[shard])
        with explained(f"{path} is damaged", "delete the folder and prepare it again", _DAMAGED):
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(path, _READER_OPTIONS)
            records = self._readers[shard].read(indices)
        size = self._records[self._bucket_of[shard]].itemsize
        if any(len(record) != size for record in records):
            raise UserError(f"{path} has no records of {size} bytes, as {MANIFEST} says: {REMEDY}")
        return records


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
    return read_settings(path)
