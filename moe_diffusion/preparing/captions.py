"""Images with captions: a folder with `metadata.jsonl`, and the fields of its prompts.

A line of `metadata.jsonl` is {"file_name": "a/1.png", "text": "a handwritten one"}, as the image
folders of Hugging Face's `datasets` have it; other keys are ignored.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moe_diffusion import pictures
from moe_diffusion.conditions import Field
from moe_diffusion.data.images import to_array
from moe_diffusion.errors import UserError, shown
from moe_diffusion.interop.prompts import PromptEncoders
from moe_diffusion.reading import lines, table_of

METADATA = "metadata.jsonl"
_CAPTION = "caption"  # in a record that `complete` has not seen yet
Record = dict[str, Any]


class CaptionFolder:
    """The source of such a folder: records of an image, its text and, if given, a guidance scale.

    `read` gives an image with its caption. `complete` encodes the captions of a batch, because an
    encoder takes many at once.

    Args:
      rows: of `read_metadata`.
      image_shape: (H, W, C) of the images; see `data.images.to_array`.
      encoders: what encodes the captions.
      guidance: value of a field "guidance" f32 in every record, for models that were distilled
        from guided ones; None: there is no such field.
      skip_broken: files that are no images are named on stderr and left out.
    """

    def __init__(
        self,
        rows: list[tuple[Path, str]],
        image_shape: tuple[int, int, int],
        encoders: PromptEncoders,
        guidance: float | None = None,
        skip_broken: bool = False,
    ):
        self.image_shape, self.skip_broken = image_shape, skip_broken
        self._encoders = encoders
        self._fixed = {} if guidance is None else {"guidance": np.float32(guidance)}
        self.cond_spec = encoders.cond_spec | {n: Field((), "float32") for n in self._fixed}
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record | None:
        """{"image", "caption"} of record `index`, or None if it is broken and may be skipped."""
        path, caption = self._rows[index]
        try:
            picture = pictures.read(
                path, str(path), "restore it, or skip such files (--skip-broken)"
            )
        except UserError as error:
            if not self.skip_broken:
                raise
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None
        pixels = to_array(picture, self.image_shape)
        return {"image": pixels, _CAPTION: caption}

    def picture_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the picture of record `index`; None if `read` may skip it."""
        remedy = "restore it, or skip such files (--skip-broken)"
        return pictures.size_of(self.name(index), self.name(index), remedy, self.skip_broken)

    def complete(self, records: list[Record]) -> list[Record]:
        """The records with the fields of `cond_spec` in place of their captions."""
        fields = self._encoders.encode([record[_CAPTION] for record in records])
        return [
            {"image": record["image"], **{name: v[i] for name, v in fields.items()}, **self._fixed}
            for i, record in enumerate(records)
        ]

    def name(self, index: int) -> str:
        """The file of record `index`."""
        return str(self._rows[index][0])


def read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """(image file, caption) of every line of a folder's `metadata.jsonl`.

    Raises:
      UserError: the metadata or a file that it names is not there, or a line is not as above; the
        message names the line.
    """
    path, rows = folder / METADATA, []
    if not path.exists():
        raise UserError(
            f'no {METADATA} in {folder}: write a line {{"file_name": ..., "text": ...}} per image'
        )
    for number, line in lines(path, METADATA):
        if not line.strip():
            continue
        where, row = f"line {number} of {path}", table_of(line)
        if row is None or not {"file_name", "text"} <= row.keys():
            raise UserError(f"{where} is no object with file_name and text: mend it")
        name, text = row["file_name"], row["text"]
        if not (isinstance(name, str) and isinstance(text, str)):
            raise UserError(f"{where}: file_name and text must be texts")
        if "\0" in name or not os.path.isfile(folder / name):
            raise UserError(f"{where} names {shown(name)}, which is not there")
        if "\ufffd" in text:
            raise UserError(f"{where}: its text is no UTF-8: write the file in UTF-8")
        rows.append((folder / name, text))
    if not rows:
        raise UserError(f"{path} has no lines: nothing to prepare")
    return rows
