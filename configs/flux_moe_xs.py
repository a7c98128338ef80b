"""FLUX.1-MoE-XS (Dense2MoE, 2510.09094, section 4.1): M, and one of five single blocks, five times.

    python -m moe_diffusion.distill --config configs/flux_moe_xs.py --workdir runs/flux_moe_xs

Five groups of five single blocks, by default the middle ones, 25-49; the paper does not say
which. `--config.model.mob.groups` names others. Arguments: see flux_moe_l.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import GROUPS_XS, level


def get_config(arg: str | None = None) -> ConfigDict:
    return level("flux_moe_xs", arg, GROUPS_XS)
