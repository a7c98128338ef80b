"""DiT-MoE-G/2 (arXiv 2407.11633) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dit_moe_g.py --workdir runs/dit_moe_g

Arguments: experts=16 | 8, objective=flow | ddpm, qk_norm=true | false (with and without
the normalisation of queries and keys that the published weights have).
Published: experts=16. 16 experts: 16.50B parameters, 3.18B of them activated.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit_moe import dit_moe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    choices = {"experts": (8, 16), "objective": ("ddpm", "flow")}
    arg = parse_arg(arg, choices=choices, experts=16, objective="flow", qk_norm=True)
    return dit_moe("g", arg.experts, arg.objective, arg.qk_norm)
