"""FLUX.1-MoE-L (Dense2MoE, 2510.09094, section 4.1): experts for MLPs, compressed modulation.

    python -m moe_diffusion.distill --config configs/flux_moe_l.py --workdir runs/flux_moe_l

54 of 57 blocks have a shared expert of ratio 1 and 12 normal ones of 0.25, of which a token takes
two. Arguments: pixels=1024; shared=1.0,normal=0.25,experts=12,top_k=2 (shared + experts x normal
must be 4, the ratio of FLUX.1's MLPs).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import level


def get_config(arg: str | None = None) -> ConfigDict:
    return level("flux_moe_l", arg)
