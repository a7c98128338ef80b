"""Writes a folder of latents shard by shard; a run that was killed can be continued.

A shard is written whole or not at all. Its records do not depend on the number of processes, so
any number of them writes the same folder. A finished shard has a note `<shard>.json` beside it.
When all shards have one, `finish` writes the manifest and deletes the notes. Of images of several
sizes a shard holds those of one bucket (`buckets.py`); the shards of a bucket follow each other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from moe_diffusion import digests, locks
from moe_diffusion.caption_records import save_null, stored_spec
from moe_diffusion.classes import of_source
from moe_diffusion.data.latents import UNFINISHED, read_settings, record_of, shapes_of, spec_of
from moe_diffusion.data.sources import check_batch, stack
from moe_diffusion.errors import UserError
from moe_diffusion.manifest import FORMAT, MANIFEST, check_note
from moe_diffusion.preparing import buckets
from moe_diffusion.preparing.pairs import UNREADABLE, LeftOut
from moe_diffusion.reading import read_table

# Each record is a separate group, for random access. Nothing is compressed, because f16 latents
# are too noisy for it.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_NAMED = 1000  # images left out that the manifest names; it counts all


@dataclasses.dataclass(frozen=True)
class Job:
    """What to encode, how, and where to.

    Attributes:
      source: of images and conditions; see `data/sources.py`. It may have `read(i)`, which returns
        None for a broken image, or a `LeftOut`, which says why a record is left out.
      moments: images f32[B, H, W, C] -> f32[B, h, w, 2c], always called with `batch` images.
      batch: images that are encoded at once, of each bucket if there are several.
      folder: where the latents go.
      settings: what the manifest says of the source and the autoencoder. This module reads
        "shape", "buckets", "moments", "flip", "fields", "scale", "shift", "seed" and "shard_size".
      workers: threads that read images.
      complete: records that were read together -> the same with all fields of their conditions,
        for what is computed of many at once; None if a record is read complete.
      null: makes the fields of the empty prompt, {field: [*shape]}; None if there are no prompts.
      views: the source with images of each bucket's size, see `buckets.views`; empty: one bucket.
    """

    source: Any
    moments: Callable[[np.ndarray], np.ndarray]
    batch: int | Sequence[int]
    folder: Path
    settings: dict[str, Any]
    workers: int
    complete: Callable[[list[Any]], list[Any]] | None = None
    null: Callable[[], dict[str, np.ndarray]] | None = None
    views: Sequence[Any] = ()

    @functools.cached_property
    def shards(self) -> list[tuple[int, Sequence[int]]]:
        """The bucket and the record numbers of each shard; `begin` must have been called."""
        size, total = self.settings["shard_size"], len(self.source)
        found: list[Any] = [range(total)]
        if self.views:
            found = buckets.records(self.folder, total, len(self.views))
        return [
            (bucket, numbers[first : first + size])
            for bucket, numbers in enumerate(found)
            for first in range(0, len(numbers), size)
        ]

    def shard_file(self, number: int) -> Path:
        return self.folder / f"latents-{number:05}-of-{len(self.shards):05}.array_record"

    def note(self, number: int) -> Path:
        return self.shard_file(number).with_suffix(".json")


def begin(job: Job) -> bool:
    """Claims the folder. One process alone calls this.

    Returns:
      Whether there is work to do: False if the folder is finished already.

    Raises:
      UserError: the folder belongs to something else, or was begun with other settings.
    """
    finished, begun = job.folder / MANIFEST, job.folder / UNFINISHED
    for path in (finished, begun):
        if path.is_file():
            _compare(path, job.settings)
    if finished.is_file():
        _tidy(job)
        return False
    if not begun.is_file():
        ours = (".part", Path(locks.NAME).suffix)
        if job.folder.is_dir() and any(p.suffix not in ours for p in job.folder.iterdir()):
            raise UserError(f"{job.folder} holds other files: choose an empty folder for --out")
        job.folder.mkdir(parents=True, exist_ok=True)
        _write_json(begun, job.settings)
    if job.views:
        sizes = [view.image_shape[:2] for view in job.views]
        buckets.assign(job.source, sizes, job.folder, job.workers)
        used = {bucket for bucket, _ in job.shards}
        for bucket, (height, width) in enumerate(sizes):
            if bucket not in used:
                print(f"no image is nearest to {height}x{width}", file=sys.stderr, flush=True)
    return True


def write_shards(job: Job, process_index: int, process_count: int) -> None:
    """Writes the shards of this process that are still missing, and shows the progress."""
    mine = range(process_index, len(job.shards), process_count)
    todo = [n for n in mine if not job.note(n).is_file()]
    total = sum(len(job.shards[n][1]) for n in mine)
    done = total - sum(len(job.shards[n][1]) for n in todo)
    quiet = process_index != 0
    with (
        tqdm(total=total, initial=done, unit="image", desc="encoding", disable=quiet) as bar,
        ThreadPoolExecutor(job.workers) as readers,
    ):
        for number in todo:
            _write_shard(job, number, readers, bar)


def finish(job: Job) -> dict[str, Any]:
    """Writes and returns the manifest. Every process must have written its shards before."""
    notes = [_read_note(job, n) for n in range(len(job.shards))]
    count = sum(note["count"] for note in notes)
    if not count:
        raise UserError("every image is broken: nothing was prepared")
    skipped = [name for note in notes for name in note["skipped"]]
    null = {"null": save_null(job.folder, job.null())} if job.null else {}
    manifest = {
        "format": FORMAT,
        "count": count,
        **job.settings,
        "class_counts": _class_counts(job, set(skipped)),
        "statistics": _statistics(job, notes),
        "skipped": skipped[:_NAMED],
        "skipped_by_reason": _reasons(notes),
        **null,
        "shards": [{k: note[k] for k in ("file", "count", "bytes", "sha256")} for note in notes],
    }
    if job.views:
        of_shards, counts = [bucket for bucket, _ in job.shards], [0] * len(job.views)
        for bucket, shard in zip(of_shards, manifest["shards"], strict=True):
            shard["bucket"] = bucket
            counts[bucket] += shard["count"]
        manifest["bucket_counts"] = counts
    manifest = digests.seal(manifest)
    _write_json(job.folder / MANIFEST, manifest)
    _tidy(job)
    return manifest


def _write_shard(job: Job, number: int, readers: ThreadPoolExecutor, bar: tqdm) -> None:
    (bucket, indices), count, skipped = job.shards[number], 0, {}
    source, size = (job.views[bucket], job.batch[bucket]) if job.views else (job.source, job.batch)
    path = job.shard_file(number)
    part = path.with_name(f".{path.name}.part")
    spec = stored_spec(spec_of(job.settings), job.settings)
    record_type, sums = record_of(job.settings, bucket), []
    writer = ArrayRecordWriter(str(part), _WRITER_OPTIONS)
    try:
        for numbers, records in _read_ahead(source, size, indices, readers):
            found = dict(zip(numbers, records, strict=True))
            skipped |= {i: x for i, x in found.items() if x is None or isinstance(x, LeftOut)}
            good = {i: record for i, record in found.items() if i not in skipped}
            if good:
                if job.complete:
                    good = dict(zip(good, job.complete(list(good.values())), strict=True))
                batch = stack(list(good.values()))
                check_batch(batch, list(good), spec)
                latents = _encode(job, size, list(good), batch["image"])
                for latent, record in zip(latents, good.values(), strict=True):
                    row = (*(record[name] for name in spec), latent)
                    writer.write(np.array(row, record_type).tobytes())
                count += len(good)
                sums.append(_sums(job, latents))
            bar.update(len(numbers))
    finally:
        writer.close()
    with part.open("rb") as file:
        os.fsync(file.fileno())  # after a power cut there must be no note without its shard
    os.replace(part, path)
    size, digest = path.stat().st_size, digests.file_digest(path)
    note = {"file": path.name, "count": count, "bytes": size, "sha256": digest}
    note["skipped"] = [job.source.name(i) for i in skipped]
    note["reasons"] = Counter(reason or UNREADABLE for reason in skipped.values())
    # The sums are per image until here, because the number of devices must not change the rounding.
    total = np.concatenate(sums).sum(0).tolist() if sums else 0
    _write_json(job.note(number), digests.seal(note | {"sums": total}))


def _read_ahead(
    source: Any, size: int, indices: Sequence[int], readers: ThreadPoolExecutor
) -> Iterator[tuple[list[int], list[Any]]]:
    """Yields batches of records. While the caller encodes one, the threads read the next."""
    read = source.read if hasattr(source, "read") else source.__getitem__
    indices = list(map(int, indices))
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    coming = [readers.submit(read, i) for i in batches[0]]
    for number, batch in enumerate(batches):
        records = coming
        following = batches[number + 1] if number + 1 < len(batches) else ()
        coming = [readers.submit(read, i) for i in following]
        yield batch, [future.result() for future in records]


def _encode(job: Job, size: int, indices: list[int], image: np.ndarray) -> np.ndarray:
    """Images f32[B, H, W, C] -> latents f16[B, F, h, w, k] as stored; `size`: at once."""
    views = [image, image[:, :, ::-1]] if job.settings["flip"] else [image]
    padding = [(0, size - len(image)), (0, 0), (0, 0), (0, 0)]
    latents = [job.moments(np.pad(view, padding))[: len(image)] for view in views]
    stored = np.stack(latents, axis=1)
    if not job.settings["moments"]:
        mean, logvar = np.split(stored, 2, axis=-1)
        keys = [[job.settings["seed"], index] for index in indices]
        noise = [
            np.random.Generator(np.random.Philox(key=key)).standard_normal(mean.shape[1:])
            for key in keys
        ]
        stored = mean + np.exp(0.5 * logvar) * np.stack(noise)
    stored = stored.astype(np.float16)
    if not np.isfinite(stored).all():
        raise UserError(
            f"latents of records {indices[0]} to {indices[-1]} are not finite: is this the right "
            "autoencoder?"
        )
    return stored


def _sums(job: Job, latents: np.ndarray) -> np.ndarray:
    """The sum of every channel, and of its square, over each image.

    Args:
      latents: f16[B, F, h, w, k], unscaled.

    Returns:
      f64[B, 2, c].
    """
    latents = latents.astype(np.float64)
    channels = job.settings["shape"][-1]
    mean = latents[..., :channels]
    square = np.square(mean)
    if job.settings["moments"]:
        square += np.exp(latents[..., channels:])
    return np.stack([mean.sum((1, 2, 3)), square.sum((1, 2, 3))], axis=1)


def _statistics(job: Job, notes: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the scaled latents."""
    areas = [height * width for height, width, _ in shapes_of(job.settings)]
    pairs = zip(job.shards, notes, strict=True)
    positions = sum(note["count"] * areas[bucket] for (bucket, _), note in pairs)
    sums = np.sum([note["sums"] for note in notes if note["count"]], axis=0)
    first, second = sums / (positions * (1 + job.settings["flip"]))
    scale, shift = job.settings["scale"], job.settings["shift"]
    deviation = scale * np.sqrt(np.maximum(second - first**2, 0))
    return {"mean": ((first - shift) * scale).tolist(), "std": deviation.tolist()}


def _class_counts(job: Job, skipped: set[str]) -> list[int] | None:
    """The images of each class that were prepared; None if the source does not list its labels."""
    counts = list(of_source(job.source).counts)
    if skipped and counts:
        for index, label in enumerate(job.source.labels.tolist()):
            counts[label] -= job.source.name(index) in skipped
    return counts or None


def _reasons(notes: list[dict[str, Any]]) -> dict[str, int]:
    """Why images were left out -> how many; an earlier version did not note it."""
    reasons: Counter[str] = Counter()
    for note in notes:
        reasons.update(note.get("reasons") or {UNREADABLE: len(note["skipped"])})
    return {reason: count for reason, count in sorted(reasons.items()) if count}


def _read_note(job: Job, number: int) -> dict[str, Any]:
    """The note of a finished shard. Raises UserError if it is damaged."""
    path = job.note(number)
    note = read_table(path, f"delete it and {job.shard_file(number).name}, and prepare again")
    check_note(note, job.shard_file(number), str(path), job.settings["shape"][-1])
    return {"sha256": digests.file_digest(job.shard_file(number))} | note


def _compare(path: Path, settings: dict[str, Any]) -> None:
    """Raises a UserError unless `path` has the same settings."""
    before = read_settings(path)
    for key, value in {"buckets": None, **settings}.items():
        if before.get(key) != value:
            raise UserError(
                f"{path} was written with {key} = {before.get(key)!r}, now it is {value!r}: "
                "choose another folder for --out, or give the same settings"
            )


def _tidy(job: Job) -> None:
    """Removes what only an unfinished folder needs."""
    for path in (*job.folder.glob("latents-*.json"), *job.folder.glob(".*.part")):
        path.unlink()
    for name in (buckets.FILE, UNFINISHED):
        (job.folder / name).unlink(missing_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(part, path)
