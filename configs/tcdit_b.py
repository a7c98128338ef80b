"""TC-DiT-B (as in arXiv 2503.14487, table 3) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/tcdit_b.py:experts=8 --workdir runs/tcdit_b

Only L was published; this is the same router in DiffMoE-B.
Arguments: experts=16 | 8 | 4 | 2, objective=flow | ddpm.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import diffmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return diffmoe("b", arg, router="tcdit")
