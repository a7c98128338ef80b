"""DiT-S/2 (arXiv 2212.09748, table 1; 33M parameters) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_s.py --workdir runs/dit_s

Argument: objective=ddpm (DiT) | flow (Dense-DiT-S-Flow of arXiv 2503.14487).
Equal training (families/settings.py): setting=diffmoe_figure8 | diffmoe_figure11.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import dit


def get_config(arg: str | None = None) -> ConfigDict:
    return dit("s", arg)
