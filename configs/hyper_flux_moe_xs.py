"""HyperFLUX-MoE-XS (Dense2MoE, 2510.09094, Table 1): FLUX.1-MoE-XS of HyperFLUX, eight steps.

    python -m moe_diffusion.distill --config configs/hyper_flux_moe_xs.py \\
      --workdir runs/hyper_flux_moe_xs

The teacher is configs/hyper_flux.py. Arguments: see flux_moe_l.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import GROUPS_XS, hyper, level


def get_config(arg: str | None = None) -> ConfigDict:
    return hyper(level("hyper_flux_moe_xs", arg, GROUPS_XS))
