"""What the manifest of a folder of prepared latents may say; `data/latents.py` reads the folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moe_diffusion import digests
from moe_diffusion.errors import UserError, shown
from moe_diffusion.reading import Key, check_keys, key_like, plain_name

MANIFEST = "manifest.json"
FORMAT = 4
CAPTIONS = "captions"  # an entry of the manifest and a field of its records, if they have several
REMEDY = "restore it, or prepare the folder again"
DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"}
DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_SIDE = Key((int,), least=1, most=1 << 16)
_COUNT = Key((int,), least=0, most=1 << 40)
_NUMBER = Key((float,), least=-1e6, most=1e6)
_TEXT, _TEXTS = Key((str,)), Key((str,), None)
_NOTHING = type(None)
_RECORD = 1 << 30  # bytes of a record, at most

_SHAPE = Key((list,), least=3, most=3, items=_SIDE)

_SETTINGS = {
    "shape": _SHAPE,
    "buckets": Key((list, _NOTHING), None, least=2, most=1000, items=_SHAPE),  # format 4
    "moments": Key((bool,)),
    "flip": Key((bool,)),
    "scale": Key((float,), least=1e-6, most=1e6),
    "shift": _NUMBER,
    "fields": Key((list,), most=100, items=Key((dict,))),
    "seed": Key((int,), 0, least=0),
    "shard_size": Key((int,), 1, least=1),
    "records": Key((int,), 0, least=0),
    "source": key_like(""),
    "split": key_like(""),
    "autoencoder": Key((dict,), {}),  # format 1 began without it
    "class_names": Key((list, _NOTHING), None, items=_TEXT),
    "class_counts": Key((list, _NOTHING), None, items=_COUNT),
    "text": Key((dict,), {}),
    CAPTIONS: Key((dict,), {}),  # format 4
}
_MANIFEST = {
    "count": Key((int,), least=1, most=1 << 40),
    "shards": Key((list,), least=1, items=Key((dict,))),
    "bucket_counts": Key((list, _NOTHING), None, items=_COUNT),  # format 4
    "statistics": Key((dict,), {}),
    "skipped": Key((list,), (), items=_TEXT),
    "skipped_by_reason": Key((dict,), {}),  # format 4
    "null": Key((dict,), {}),  # format 4
}
_FIELD = {
    "name": _TEXT,
    "shape": Key((list,), most=8, items=Key((int,), least=0, most=1 << 24)),
    "dtype": _TEXT,
    "num_values": Key((int, _NOTHING), least=1, most=1 << 40),
}
_SHARD = {
    "file": _TEXT,
    "count": _COUNT,
    "bytes": Key((int,), least=0, most=1 << 60),
    "sha256": Key((str, _NOTHING), None),  # format 3
    "bucket": Key((int,), 0, least=0, most=999),  # format 4
}
_SEVERAL = {"per_image": Key((int,), least=2, most=255), "fields": Key((list,), items=_TEXT)}
_NULL = {"file": _TEXT, "bytes": _COUNT, "sha256": _TEXT, "fields": Key((list,), items=_TEXT)}
_TEXT_BY = {
    "encoder": _TEXT,
    "fingerprint": _TEXT,
    "length": Key((int,), least=1, most=1 << 24),
    "mask": Key((str, _NOTHING), None),
}
_MADE_BY = {"name": _TEXT, "fingerprint": _TEXT}


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Checks what a manifest and the settings of an unfinished run have in common.

    Args:
      settings: with "fields", also in format 1.
      where: the file, with which the message begins.

    Raises:
      UserError: a key is lacking, or its value cannot be; the message names it. Other keys may be
        there.
    """
    check_keys(settings, _SETTINGS, where, REMEDY)
    if settings.get("autoencoder"):
        check_keys(settings["autoencoder"], _MADE_BY, f"{where}: autoencoder", REMEDY)
    several = settings.get(CAPTIONS) or {"per_image": 1, "fields": []}
    check_keys(several, _SEVERAL if settings.get(CAPTIONS) else {}, f"{where}: captions", REMEDY)
    shapes = settings.get("buckets") or [settings["shape"]]
    if settings["shape"] != shapes[0] or any(shape[2] != shapes[0][2] for shape in shapes):
        raise UserError(f"{where}: shape is not the first of buckets, or channels differ: {REMEDY}")
    largest = max(height * width * channels for height, width, channels in shapes)
    size = 2 * (1 + settings["flip"]) * (1 + settings["moments"]) * largest
    names = []
    for i, field in enumerate(settings["fields"]):
        named = f"{where}: fields[{i}]"
        check_keys(field, _FIELD, named, REMEDY)
        if field["dtype"] not in DTYPES:
            raise UserError(f"{named}: dtype is {field['dtype']!r}, not one of numbers: {REMEDY}")
        if not field["name"].isidentifier() or field["name"] in (*names, "image", CAPTIONS):
            raise UserError(f"{named}: name is {field['name']!r}, no new name of a field: {REMEDY}")
        if field["name"] == "label" and field["num_values"] is None:
            raise UserError(f"{named}: num_values is null, not the number of classes: {REMEDY}")
        names.append(field["name"])
        values = 1
        for side in field["shape"]:
            values *= side
        size += 8 * values * (several["per_image"] if field["name"] in several["fields"] else 1)
    _check_named(several["fields"], names, f"{where}: captions")
    if size > _RECORD:
        raise UserError(f"{where}: shape and fields make records of {size:,} bytes: {REMEDY}")


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Checks what only a finished folder says: counts, names and sizes of its shards, statistics.

    Raises:
      UserError: see `check_settings`; or the format is a later one, the numbers contradict each
        other, or a shard does not lie in the folder.
    """
    number = manifest.get("format")
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise UserError(
            f"{where} is of format {shown(number)}, this version of moe_diffusion reads 1 to "
            f"{FORMAT}: update moe_diffusion, or prepare the folder again"
        )
    if number >= 3 or "digest" in manifest:
        _check_seal(manifest, where, REMEDY)
    check_settings(manifest, where)
    check_keys(manifest, _MANIFEST, where, REMEDY)
    _check_texts(manifest, where)
    channels = manifest["shape"][-1]
    for name, least in (("mean", -1e30), ("std", 0)) if manifest.get("statistics") else ():
        numbers = Key((float,), least=least, most=1e30)
        wanted = {name: Key((list,), least=channels, most=channels, items=numbers)}
        check_keys(manifest["statistics"], wanted, f"{where}: statistics", REMEDY)
    for i, shard in enumerate(manifest["shards"]):
        check_keys(shard, _SHARD, f"{where}: shards[{i}]", REMEDY)
        plain_name(shard["file"], f"{where}: shards[{i}]: file", REMEDY)
    files = [shard["file"] for shard in manifest["shards"]]
    if len(set(files)) != len(files):
        raise UserError(f"{where} names a shard twice: {REMEDY}")
    counted = sum(shard["count"] for shard in manifest["shards"])
    if counted != manifest["count"]:
        raise UserError(
            f"{where} says {manifest['count']} records, its shards hold {counted}: prepare it again"
        )
    counts = [0] * len(manifest.get("buckets") or [0])
    of_shards = [shard.get("bucket", 0) for shard in manifest["shards"]]
    if of_shards != sorted(of_shards) or max(of_shards) >= len(counts):
        raise UserError(f"{where}: the buckets of its shards are not in order: {REMEDY}")
    for bucket, shard in zip(of_shards, manifest["shards"], strict=True):
        counts[bucket] += shard["count"]
    if counts != (manifest.get("bucket_counts") or counts):
        raise UserError(f"{where}: bucket_counts is not what the shards hold: {REMEDY}")


def _check_texts(manifest: Mapping[str, Any], where: str) -> None:
    """Checks what a manifest says of text encoders, the empty prompt and what was left out."""
    for name, made in (manifest.get("text") or {}).items():
        named = f"{where}: text.{name}"
        Key((dict,)).check(made, named, REMEDY)
        check_keys(made, _TEXT_BY, named, REMEDY)
    for name, count in (manifest.get("skipped_by_reason") or {}).items():
        _COUNT.check(count, f"{where}: skipped_by_reason.{name}", REMEDY)
    if null := manifest.get("null"):
        check_keys(null, _NULL, f"{where}: null", REMEDY)
        plain_name(null["file"], f"{where}: null.file", REMEDY)
        _check_named(null["fields"], [f["name"] for f in manifest["fields"]], f"{where}: null")


def _check_named(fields: list[str], names: list[str], where: str) -> None:
    """Raises a UserError unless a list names fields of the condition, each once."""
    if not set(fields) <= set(names) or len(set(fields)) != len(fields):
        raise UserError(f"{where}.fields is {shown(fields)}, and the fields are {names}: {REMEDY}")


def check_note(note: Mapping[str, Any], shard: Path, where: str, channels: int) -> None:
    """Checks the note of a finished shard, from which the manifest is made.

    Args:
      shard: the file that it is about.
      channels: of a latent.

    Raises:
      UserError: a key is lacking, its value cannot be, or it contradicts the file.
    """
    remedy = f"delete it and {shard.name}, and prepare again"
    if "sha256" in note or "digest" in note:  # an earlier version stored none
        _check_seal(note, where, remedy)
    left_out = {"skipped": Key((list,), items=_TEXT), "reasons": Key((dict,), {})}
    check_keys(note, _SHARD | left_out, where, remedy)
    for reason, count in (note.get("reasons") or {}).items():
        _COUNT.check(count, f"{where}: reasons.{reason}", remedy)
    if note["count"]:
        row = Key((list,), least=channels, most=channels, items=Key((float,)))
        check_keys(note, {"sums": Key((list,), least=2, most=2, items=row)}, where, remedy)
    size = shard.stat().st_size if shard.is_file() else None
    if note["file"] != shard.name or note["bytes"] != size:
        raise UserError(f"{where} is not of the {size} bytes of {shard.name}: {remedy}")


def how_to_prepare(folder: str, shape: tuple[int, int, int], fields: Collection[str]) -> str:
    """What the folder of a `data.source` must hold, and a command that makes one, as an example.

    Args:
      shape: (h, w, c) of the latents.
      fields: names of the condition's.
    """
    height, width, channels = shape
    size = f"{8 * height}x{8 * width}"
    source, vae = "--source folder:/data", "sd-vae-ft-ema/"
    if "text" in fields:
        source, vae = "--captions folder:/data --text-encoders FLUX.1-dev/", "FLUX.1-dev/"
        source += " --text-mask" * ("text_mask" in fields)
        source += " --no-pooled" * ("pooled" not in fields)
    return (
        f"the folder of data.source=latents:{folder} is not there. It must hold {height}x{width}x"
        f"{channels} latents with the condition {', '.join(fields) or '(none)'}. An example, "
        "where the autoencoder has 8 pixels per latent: `python -m moe_diffusion.prepare "
        f"{source} --size {size} --vae {vae} --out {folder}`. "
        "To train right now without data: --config.data.source=synthetic"
    )


def _check_seal(values: Mapping[str, Any], where: str, remedy: str) -> None:
    if not digests.is_sealed(values):
        raise UserError(f"{where} is damaged (it is not what prepare wrote): {remedy}")
