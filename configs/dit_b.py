"""DiT-B/2 (arXiv 2212.09748, table 1; 130M parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_b.py --workdir runs/dit_b

Argument: objective=ddpm (DiT) | flow (Dense-DiT-B-Flow of arXiv 2503.14487).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import OBJECTIVES, dit
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"objective": OBJECTIVES}, objective="ddpm")
    return dit("b", arg.objective)
