"""DiT-MoE-S/2 (arXiv 2407.11633) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_moe_s.py --workdir runs/dit_moe_s

Arguments: experts=8 | 16, objective=ddpm | flow.
Published: experts=8 and 16. 8 experts: 199.2M parameters, 71.8M of them activated.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit_moe import dit_moe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    choices = {"experts": (8, 16), "objective": ("ddpm", "flow")}
    arg = parse_arg(arg, choices=choices, experts=8, objective="ddpm")
    return dit_moe("s", arg.experts, arg.objective)
