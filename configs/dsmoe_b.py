"""DSMoE-B (arXiv 2512.01252, Table 1) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dsmoe_b.py:experts=48 --workdir runs/dsmoe_b

Argument: experts=16 | 48 (132M and 118M activated parameters as the paper counts, 2^20 to the M).
Ablations: ablation=s0a3 | gqa | no_interleave | ape | rope1d (section 4.3; s0a6 with experts=48).
Equal training (families/settings.py): setting=dsmoe_table2 | dsmoe_table3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dsmoe import dsmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return dsmoe("b", arg)
