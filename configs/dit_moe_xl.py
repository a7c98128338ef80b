"""DiT-MoE-XL/2 (arXiv 2407.11633) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_moe_xl.py --workdir runs/dit_moe_xl

Arguments: experts=8 | 16, objective=flow | ddpm, qk_norm=true | false (with and without
the normalisation of queries and keys that the published weights have).
Published: experts=8. 8 experts: 4.17B parameters, 1.49B of them activated.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit_moe import dit_moe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    choices = {"experts": (8, 16), "objective": ("ddpm", "flow")}
    arg = parse_arg(arg, choices=choices, experts=8, objective="flow", qk_norm=True)
    return dit_moe("xl", arg.experts, arg.objective, arg.qk_norm)
