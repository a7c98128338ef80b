"""ProMoE-XL (arXiv 2510.24711; its authors' 004_ProMoE_XL.yaml) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/promoe_xl.py --workdir runs/promoe_xl

Arguments: routing=token_choice | expert_choice, objective=flow | ddpm.
1,567.4M parameters, 675.0M of them activated.
Equal training (families/settings.py): setting=promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.promoe import promoe


def get_config(arg: str | None = None) -> ConfigDict:
    return promoe("xl", arg)
