"""Dense-DiT-XXL (arXiv 2503.14487, table 5; 951M parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_xxl.py --workdir runs/dit_xxl

Argument: objective=flow (as published) | ddpm. Depth and width are not published: see SIZES.
Equal training (families/settings.py): setting=diffmoe_table5.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import dit


def get_config(arg: str | None = None) -> ConfigDict:
    return dit("xxl", arg, objective="flow")
