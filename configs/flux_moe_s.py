"""FLUX.1-MoE-S (Dense2MoE, 2510.09094, section 4.1): M, and one of five single blocks, thrice.

    python -m moe_diffusion.distill --config configs/flux_moe_s.py --workdir runs/flux_moe_s

Three groups of five single blocks, by default the middle ones, 30-44; the paper does not say
which. `--config.model.mob.groups` names others. Arguments: see flux_moe_l.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import GROUPS_S, level


def get_config(arg: str | None = None) -> ConfigDict:
    return level("flux_moe_s", arg, GROUPS_S)
