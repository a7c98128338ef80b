"""FLUX.1-MoE-M (Dense2MoE, 2510.09094, section 4.1): L, and one of three double blocks.

    python -m moe_diffusion.distill --config configs/flux_moe_m.py --workdir runs/flux_moe_m

Five groups (blocks 4-18) of three double blocks, of which a sample passes one. Which 15 of the 16
the paper groups is not said; `--config.model.mob.groups` names others. Arguments: see flux_moe_l.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import GROUPS_M, level


def get_config(arg: str | None = None) -> ConfigDict:
    return level("flux_moe_m", arg, GROUPS_M)
