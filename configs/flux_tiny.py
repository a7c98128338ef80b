"""A FLUX.1 transformer of two double and three single blocks, on made-up data: for tests.

python -m moe_diffusion.train --config configs/flux_tiny.py --workdir runs/flux_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import tiny
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    return tiny()
