"""Ablations of Dense2MoE (2510.09094), by default 1S12E2A of Table 4: single blocks, 512 x 512.

    python -m moe_diffusion.distill --config configs/flux_moe_ablation.py:variant=0.5s14e4a \\
      --workdir runs/flux_moe_0.5s14e4a

Table 2: variant=pruned1.5 | pruned2 | moe1.5. Table 3: variant=depth9_38 | depth9_26 (FLUX.1-Lite's
and BK-SDM's sizes) | mob9_38 | mob9_26. Table 4: variant=1s12e2a | 0.5s14e4a. Table 5:
variant=random_split | joint. Figure 5: variant=groups4x3 | groups2x6 | groups1x12.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import ablation


def get_config(arg: str | None = None) -> ConfigDict:
    return ablation(arg)
