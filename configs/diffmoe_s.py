"""DiffMoE-S (arXiv 2503.14487, table 1; 32M activated parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/diffmoe_s.py:experts=8 --workdir runs/diffmoe_s

Arguments: experts=16 | 8 | 4 | 2 (published: 16), objective=flow | ddpm.
Equal training (families/settings.py): setting=diffmoe_figure8 | diffmoe_figure11 | dsmoe_table2.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import diffmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return diffmoe("s", arg)
