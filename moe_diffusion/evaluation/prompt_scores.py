"""Draws and scores the images of a run for prompts, batch by batch, and goes on where it stopped.

What the scorers say of a batch is kept in `<workdir>/prompt_scores/<digest of all settings>/`, and
read when all is there. `evaluator.evaluate` removes it at its end.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from moe_diffusion import locks
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.features import MAX_VECTORS, Extractor, FeatureSet
from moe_diffusion.evaluation.images import check_range
from moe_diffusion.evaluation.runs import Asked, RunImages
from moe_diffusion.evaluation.scorers import FeatureRows, Wanted, chosen_scorers
from moe_diffusion.models.clip import CLIPEncoder
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.sampling.layouts import Folder, check, check_folder, layout_of
from moe_diffusion.sampling.load import weights_digest
from moe_diffusion.writing import save_arrays

FOLDER = "prompt_scores"
_FEATURES, _DROPPED = "features", "dropped"
_FILE = re.compile(r"rows_(\d{9})\.npz")
_PASSING = ("software", "devices", "batch_size", "dropped")  # images do not depend on them


class Prompts(NamedTuple):
    """What `evaluate --prompts` asks for.

    Attributes:
      asked: the prompts, and how they are read.
      each: images of each prompt; 0 leaves it to the benchmark or to `--num`.
      clip: scores; None for none.
      save_images: folder for the images; None for none.
      layout: of that folder; None is that of the benchmark.
    """

    asked: Asked
    each: int = 0
    clip: CLIPEncoder | None = None
    save_images: str | None = None
    layout: str | None = None

    @property
    def layout_name(self) -> str:
        return layout_of(self.asked.file, self.layout)

    def num(self, asked: int = 0) -> int:
        """How many images there are in all; `asked` is what --num says, 0 if nothing.

        Raises:
          UserError: the layout of the images takes another number, or other prompts, or their
            folder has something else.
        """
        file = self.asked.file
        num = asked or (self.each or file.images) * len(file.items)
        if self.save_images:
            check_folder(self.save_images)
            check(self.layout_name, file, num)
        return num


class Judged(NamedTuple):
    """What the images are found to be.

    Attributes:
      features: of the images, if there was an extractor.
      metrics: name -> number.
      notes: name of a scorer -> what it is.
    """

    features: FeatureSet | None
    metrics: dict[str, float]
    notes: dict[str, Any]


class Records:
    """Rows of images in files, each of one batch; whole files up to the first gap count.

    Args:
      folder: of these settings alone.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(folder)

    def batches(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """(number of the first image, rows) of the batches from image 0 on, without a gap."""
        found, end = [], 0
        for first, path in self._files():
            rows = _read(path)
            if first != end or rows is None:
                break
            found.append((first, rows))
            end += int(rows["count"])
        return found

    def write(self, first: int, count: int, rows: Mapping[str, np.ndarray]) -> None:
        save_arrays(self.folder / f"rows_{first:09}.npz", {"count": count, **rows})

    def drop_from(self, first: int) -> None:
        """Deletes the batches that begin at an image or later."""
        for number, path in self._files():
            if number >= first:
                path.unlink()

    def remove(self) -> None:
        """Deletes the folder, and the one around it if that is empty then."""
        if self.folder.exists():
            self.folder.rmtree()
        if self.folder.parent.exists() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _files(self) -> list[tuple[int, epath.Path]]:
        if not self.folder.exists():
            return []
        named = [(_FILE.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match)


def judge(
    images: RunImages, prompts: Prompts, extractor: Extractor | None
) -> tuple[Judged, Records]:
    """Draws what is not drawn yet, scores it, and makes the metrics of all.

    Returns:
      What was found, and the records, to be removed when they are needed no more.

    Raises:
      UserError: there is no scorer, the folder of images has others, or an image is not finite.
    """
    wanted = Wanted(images.config, images.shape, images.texts, prompts.clip)
    scorers = chosen_scorers(wanted)
    notes = {name: scorer.note for name, scorer in scorers.items()}
    features = FeatureRows(extractor, images.name) if extractor else None
    told, saved = images.conditions, None
    settings = settings_of(images, told)
    if prompts.save_images and is_main_process():
        saved = Folder(
            prompts.save_images, prompts.layout_name, prompts.asked.file, len(images), settings
        )
    key = json.dumps([settings, notes, extractor and extractor.note, told["software"]])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    records = Records(epath.Path(images.name) / FOLDER / name)
    judges = {**scorers, **({_FEATURES: features} if features else {})}
    if not judges and not saved and is_main_process():
        raise UserError(
            "nobody scores these images: give --clip, a --reference (with --inception), or "
            "--save-images for a scorer elsewhere"
        )
    with locks.held(records.folder, "an evaluation"):
        _draw(images, judges, saved, records, {"seed": str(told["seed"])})
        rows = _joined(records)
    images.set_shares(rows[_DROPPED]["shares"].tolist())
    metrics: dict[str, float] = {}
    for name, scorer in scorers.items():
        metrics |= scorer.metrics(rows[name], images.texts)
    found = features.features(rows[_FEATURES], MAX_VECTORS) if features else None
    return Judged(found, metrics, notes), records


def settings_of(images: RunImages, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the images depend on, as JSON has it.

    told: `images.conditions`.
    """
    told = {key: value for key, value in told.items() if key not in _PASSING}
    told["weights"] = weights_digest(images.name, told["step"])
    told["model"] = images.config.model.to_dict()
    told["text_encoders"] = images.asked.text_encoders or images.config.data.text_encoders
    return json.loads(json.dumps(told, default=str))


def _draw(
    images: RunImages,
    judges: Mapping[str, Any],
    saved: Folder | None,
    records: Records,
    fields: Mapping[str, str],
) -> None:
    """Draws, scores and keeps the batches that are not there yet; pictures carry `fields`."""
    num, start = len(images), 0
    if is_main_process():
        ends = [first + int(rows["count"]) for first, rows in records.batches()]
        there = min(num, saved.first_missing() if saved else num)
        start = max(end for end in (0, *ends) if end <= there)
        records.drop_from(start)
        if saved:
            saved.begin()
    if jax.process_count() > 1:
        start = int(multihost_utils.broadcast_one_to_all(np.int32(start)))
    told = {"total": num, "initial": start, "unit": "image", "desc": f"scores of {images.name}"}
    with tqdm(disable=None if is_main_process() else True, **told) as bar:
        for batch in images.batches(0, num, start) if start < num else ():
            check_range(batch, images.name)
            texts = images.texts[start : start + len(batch)]
            rows = {
                f"{name}.{key}": values
                for name, judge in judges.items()
                for key, values in judge.rows(batch, texts).items()
            }
            rows[f"{_DROPPED}.shares"] = np.array(images.new_shares(), np.float64)
            if is_main_process():
                if saved:
                    saved.write(batch, start, fields)
                records.write(start, len(batch), rows)
            start += len(batch)
            bar.update(len(batch))
    if saved:
        saved.finish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prompt_scores")


def _joined(records: Records) -> dict[str, dict[str, np.ndarray]]:
    """Name of a scorer -> its rows of all images."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for _, rows in records.batches():
        for key, values in rows.items():
            name, _, part = key.partition(".")
            if part:
                found.setdefault(name, {}).setdefault(part, []).append(values)
    return {
        name: {part: np.concatenate(values) for part, values in parts.items()}
        for name, parts in found.items()
    }


def _read(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            rows = dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return rows if "count" in rows else None
