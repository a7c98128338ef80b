"""DSMoE-L (arXiv 2512.01252, Table 1) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dsmoe_l.py --workdir runs/dsmoe_l
    python -m moe_diffusion.train --config configs/dsmoe_l.py:experts=16 --workdir runs/dsmoe_l_e16

Argument: experts=48 | 16 (436M and 465M activated parameters as the paper counts, 2^20 to the M).
48 is the default: with fewer parameters in all, it also trains on a machine of 24 GB.
Ablations: ablation=s0a3 | gqa | no_interleave | ape | rope1d (section 4.3; s0a6 with experts=48).
Equal training (families/settings.py): setting=dsmoe_table2 | dsmoe_table3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dsmoe import dsmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return dsmoe("l", arg, experts=(48, 16))
