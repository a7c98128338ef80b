"""DiT-XL/2 (arXiv 2212.09748, table 1; 675M parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_xl.py --workdir runs/dit_xl

Argument: objective=ddpm (DiT) | flow (Dense-DiT-XL-Flow of arXiv 2503.14487).
Equal training (families/settings.py): setting=diffmoe_table2 | diffmoe_table2_ddpm | diffmoe_table3
| diffmoe_table5 | diffmoe_table8 | diffmoe_table11 | promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import dit


def get_config(arg: str | None = None) -> ConfigDict:
    return dit("xl", arg)
