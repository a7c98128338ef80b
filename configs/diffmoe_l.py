"""DiffMoE-L (arXiv 2503.14487, table 1; 458M activated parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/diffmoe_l.py:experts=8 --workdir runs/diffmoe_l

Arguments: experts=16 | 8 | 4 | 2 (published: all four, figure 9), objective=flow | ddpm.
Equal training (families/settings.py): setting=diffmoe_table2 | diffmoe_table2_ddpm | diffmoe_table3
| diffmoe_table5 | diffmoe_table8 | diffmoe_table11 | diffmoe_figure8 | diffmoe_figure9 |
diffmoe_figure11 | dsmoe_table2 | promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import diffmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return diffmoe("l", arg)
