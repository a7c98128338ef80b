"""DSMoE-3B (arXiv 2512.01252, Table 1) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dsmoe_3b.py --workdir runs/dsmoe_3b

Argument: experts=16, the only one published (965M activated parameters, 2^20 to the M).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dsmoe import dsmoe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"experts": (16,)}, experts=16)
    return dsmoe("3b", arg.experts)
