"""SiT-XL/2 as a Mixture of Experts (Dense2MoE, arXiv 2510.09094, on arXiv 2401.08740).

    python -m moe_diffusion.convert --family sit --input SiT-XL-2-256x256.pt --output runs/sit_xl
    python -m moe_diffusion.distill --config configs/sit_xl_moe.py --workdir runs/sit_xl_moe \\
      --config.distill.teacher=runs/sit_xl

Arguments: skip_first=0 (blocks that stay dense), adaln_rank=0 (width of the compressed modulation;
96 is the ratio of FLUX.1-MoE, 0 leaves it whole), groups=none or like 4-6+7-9 (Mixture of Blocks),
active=1 (blocks of a group that a sample passes).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import dense2moe
from configs.families.dit import sit


def get_config(arg: str | None = None) -> ConfigDict:
    return dense2moe.xl_moe(sit("xl"), dense2moe.parse(arg))
