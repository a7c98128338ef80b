"""ProMoE-S (arXiv 2510.24711; its authors' 004_ProMoE_S.yaml) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/promoe_s.py --workdir runs/promoe_s

Arguments: routing=token_choice | expert_choice, objective=flow | ddpm.
75.4M parameters, 32.9M of them activated.
Equal training (families/settings.py): setting=promoe.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.promoe import promoe


def get_config(arg: str | None = None) -> ConfigDict:
    return promoe("s", arg)
