"""DiffMoE-E16-T2I-Flow (arXiv 2503.14487, table 7; 1.2B of 4.6B activated), 256x256 latents.

    python -m moe_diffusion.train --config configs/diffmoe_t2i.py --workdir runs/diffmoe_t2i

Arguments: stage=pretrain | sft (supervised fine-tuning of runs/diffmoe_t2i on JourneyDB).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.t2i import STAGES, t2i
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"stage": STAGES}, stage="pretrain")
    return t2i("diffmoe_t2i", "diffmoe", arg.stage)
