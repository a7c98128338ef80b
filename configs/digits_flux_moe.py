"""The tiny FLUX.1 of digits_flux.py as a Mixture of Experts and of Blocks (Dense2MoE).

    python -m moe_diffusion.distill --config configs/digits_flux_moe.py --workdir runs/digits_moe \\
      --config.distill.teacher=runs/digits_flux

Argument: level=l, m or s, as in Table 1 of 2510.09094: experts; also groups of three double blocks;
also groups of five single blocks.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import digits_moe
from moe_diffusion.config import parse_arg

GROUPS = {"l": ("none",), "m": ("1-3",), "s": ("1-3", "4-8", "9-13")}


def get_config(arg: str | None = None) -> ConfigDict:
    level = parse_arg(arg, level="l", choices={"level": tuple(GROUPS)}).level
    config = digits_moe()
    config.name = f"digits_flux_moe_{level}"
    config.model.mob.groups = GROUPS[level]
    config.loss_weights.balance = 1e-2
    if level != "l":
        config.loss_weights.block_balance = 1e-2
    return config
