"""DiffMoE-S (arXiv 2503.14487, table 1; 32M activated parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/diffmoe_s.py:experts=8 --workdir runs/diffmoe_s

Arguments: experts=16 | 8 | 4 | 2 (published: 16), objective=flow | ddpm.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import diffmoe
from configs.families.dit import OBJECTIVES
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    choices = {"experts": (2, 4, 8, 16), "objective": OBJECTIVES}
    arg = parse_arg(arg, choices=choices, experts=16, objective="flow")
    return diffmoe("s", arg.experts, arg.objective)
