"""DSMoE-3B (arXiv 2512.01252, Table 1) on ImageNet 256x256 latents.

    python -m moe_diffusion.train --config configs/dsmoe_3b.py --workdir runs/dsmoe_3b

Argument: experts=16, the only one published (965M activated parameters, 2^20 to the M).
Ablations: ablation=s0a3 | gqa | no_interleave | ape | rope1d (section 4.3).
Equal training (families/settings.py): setting=dsmoe_table2.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dsmoe import dsmoe


def get_config(arg: str | None = None) -> ConfigDict:
    return dsmoe("3b", arg, experts=(16,))
