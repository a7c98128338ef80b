"""Compares a folder of latents with the digests in its manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moe_diffusion import digests
from moe_diffusion.data.latents import Latents
from moe_diffusion.errors import UserError


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads a finished folder whole and compares it with its manifest, which is returned.

    Raises:
      UserError: a shard or the empty prompt is missing or damaged; or the manifest is older than
        format 3.
    """
    manifest = Latents(folder).manifest
    for shard in manifest["shards"]:
        path = Path(folder) / shard["file"]
        if "sha256" not in shard:
            raise UserError(f"{folder} was prepared before digests were stored: prepare it again")
        if digests.file_digest(path) != shard["sha256"]:
            raise UserError(
                f"{path} is damaged or of another folder: copy it again, or delete the folder and "
                "prepare it again"
            )
    return manifest
