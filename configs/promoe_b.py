"""ProMoE-B (arXiv 2510.24711; its authors' 004_ProMoE_B.yaml) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/promoe_b.py --workdir runs/promoe_b

Arguments: routing=token_choice | expert_choice, objective=flow | ddpm.
300.4M parameters, 130.4M of them activated.
Equal training (families/settings.py): setting=dsmoe_table3 | promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.promoe import promoe


def get_config(arg: str | None = None) -> ConfigDict:
    return promoe("b", arg)
