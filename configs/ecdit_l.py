"""EC-DiT-L (as in arXiv 2503.14487, table 3) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/ecdit_l.py:experts=8 --workdir runs/ecdit_l

Arguments: experts=16 | 8 | 4 | 2 (published: 16), objective=flow | ddpm (its table 11),
predictor=false | true (a capacity predictor: its table 8, dynamic intra-sample routing).
Equal training (families/settings.py): setting=diffmoe_table3 | diffmoe_table8 | diffmoe_table11 |
promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import diffmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return diffmoe("l", arg, router="ecdit")
