"""DiT-L/2 (arXiv 2212.09748, table 1; 458M parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_l.py --workdir runs/dit_l

Argument: objective=ddpm (DiT) | flow (Dense-DiT-L-Flow of arXiv 2503.14487).
Equal training (families/settings.py): setting=diffmoe_table3 | diffmoe_table8 | diffmoe_table11 |
diffmoe_figure8 | diffmoe_figure9 | diffmoe_figure11 | dsmoe_table3 | promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import dit


def get_config(arg: str | None = None) -> ConfigDict:
    return dit("l", arg)
