"""Records with several captions, and the empty prompt: what a prepared folder says of texts.

A manifest with `"captions": {"per_image": N, "fields": ["text", "text_mask", "pooled"]}` stores
each of these fields N times, [N, *shape], and a number `captions` u8 in every record: how many of
the N differ. An image with fewer captions repeats them, so only the first `captions` are drawn.
Without the entry there is one caption a record and no such number.

The file that the manifest's "null" names holds the fields of the empty prompt, one after the other,
little-endian and without gaps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  makes bfloat16 known to numpy
import numpy as np

from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError, explained
from moe_diffusion.manifest import CAPTIONS, MANIFEST
from moe_diffusion.writing import whole_file

MOST = 255  # captions of an image
NULL_FILE = "empty_prompt.bin"
_REMEDY = "copy the folder again, or delete it and prepare it again"
Batch = dict[str, np.ndarray]


def stored_spec(spec: Mapping[str, Field], settings: Mapping[str, Any]) -> dict[str, Field]:
    """The fields as records hold them: those of texts N times, and how many captions there are.

    Args:
      spec: the fields as a model takes them.
      settings: a manifest, or the settings of a run of `prepare`.
    """
    several = settings.get(CAPTIONS)
    if not several:
        return dict(spec)
    times, names = several["per_image"], several["fields"]
    fields = {
        name: field._replace(shape=(times, *field.shape)) if name in names else field
        for name, field in spec.items()
    }
    return {CAPTIONS: Field((), "uint8", times + 1), **fields}


def first_captions(batch: Batch, settings: Mapping[str, Any]) -> Batch:
    """A stored batch with the first caption of every record, [B, *shape]."""
    return _chosen(batch, settings, np.zeros(len(batch["image"]), int))


def draw_captions(
    batch: Batch, settings: Mapping[str, Any], positions: Sequence[int], seed: int
) -> Batch:
    """A stored batch with one caption of every record, the same one for all fields of texts.

    The choice is a function of the seed and of the record's position in the global batch. It uses
    other random numbers than those of the image.

    Args:
      batch: {field: [B, ...]} as stored.
      positions: of the B records in the global batch.
      seed: of this batch.
    """
    if not settings.get(CAPTIONS):
        return batch
    drawn = [
        np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1])).random()
        for position in positions
    ]
    return _chosen(batch, settings, (np.array(drawn) * batch[CAPTIONS]).astype(int))


def _chosen(batch: Batch, settings: Mapping[str, Any], numbers: np.ndarray) -> Batch:
    several = settings.get(CAPTIONS)
    if not several:
        return batch
    rows = np.arange(len(numbers))
    return {
        name: values[rows, numbers] if name in several["fields"] else values
        for name, values in batch.items()
        if name != CAPTIONS
    }


def save_null(folder: Path, null: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes the fields of the empty prompt, whole or not at all; returns the manifest's entry.

    null: {field: [*shape]} of one sample.
    """
    data = b"".join(np.ascontiguousarray(values).tobytes() for values in null.values())
    with whole_file(folder / NULL_FILE) as file:
        file.write(data)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": NULL_FILE, "bytes": len(data), "sha256": digest, "fields": list(null)}


def read_null(
    folder: str | os.PathLike, manifest: Mapping[str, Any], spec: Mapping[str, Field]
) -> dict[str, np.ndarray]:
    """The fields of the empty prompt, {field: [*shape]}; {} if the folder holds none.

    Raises:
      UserError: the file is not what the manifest says.
    """
    entry = manifest.get("null")
    if not entry:
        return {}
    path = Path(folder) / entry["file"]
    with explained(f"{path} cannot be read", _REMEDY, (OSError,)):
        data = path.read_bytes()
    kind = np.dtype([(name, spec[name].dtype, spec[name].shape) for name in entry["fields"]])
    if hashlib.sha256(data).hexdigest() != entry["sha256"] or len(data) != kind.itemsize:
        raise UserError(f"{path} is not what {MANIFEST} says: {_REMEDY}")
    record = np.frombuffer(data, kind)[0]
    return {name: np.array(record[name]) for name in entry["fields"]}
