"""Images with captions: a folder with `metadata.jsonl`, and the fields of its prompts.

A line of `metadata.jsonl` is {"file_name": "a/1.png", "text": "a handwritten one"}, as the image
folders of Hugging Face's `datasets` have it; other keys are ignored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.conditions import Field
from moe_diffusion.data.images import to_array
from moe_diffusion.errors import UserError
from moe_diffusion.interop.prompts import PromptEncoders

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
            with Image.open(path) as image:
                pixels = to_array(image, self.image_shape)
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, ...
            what = f"{path} cannot be read as an image ({error})"
            if not self.skip_broken:
                raise UserError(
                    f"{what}: restore it, or skip such files with --skip-broken"
                ) from None
            print(f"skipped: {what}", file=sys.stderr, flush=True)
            return None
        return {"image": pixels, _CAPTION: caption}

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
    if not path.is_file():
        raise UserError(
            f'no {METADATA} in {folder}: write a line {{"file_name": ..., "text": ...}} per image'
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): write it in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {path} is no object with file_name and text ({error!r}): mend it"
            ) from None
        if not (isinstance(name, str) and isinstance(text, str)):
            raise UserError(f"line {number} of {path}: file_name and text must be texts")
        rows.append((folder / name, text))
        if not rows[-1][0].is_file():
            raise UserError(f"line {number} of {path} names {rows[-1][0]}, which is not there")
    if not rows:
        raise UserError(f"{path} has no lines: nothing to prepare")
    return rows
