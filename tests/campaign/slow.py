"""Data that is read slowly, so that a small training can be disturbed in its middle."""

from __future__ import annotations

import time
from typing import Any

from moe_diffusion.synthetic import Synthetic

SECONDS = 0.004  # a record; 16 of them are a batch


class Slow(Synthetic):
    """`data.source=tests.campaign.slow:Slow`: the records of `synthetic`, each a little later."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(SECONDS)
        return super().__getitem__(index)
