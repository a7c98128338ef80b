"""SiT-S/2 (arXiv 2401.08740, table 1; 33M parameters) on ImageNet 256x256 latents.

python -m moe_diffusion.train --config configs/sit_s.py --workdir runs/sit_s
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import sit
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    return sit("s")
