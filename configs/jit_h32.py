"""JiT-H/32 (arXiv 2511.13720, Table 9) on ImageNet at 512 x 512 pixels.

python -m moe_diffusion.train --config configs/jit_h32.py --workdir runs/jit_h32
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.jit import jit


def get_config(arg: str | None = None) -> ConfigDict:
    return jit("H", 32, arg)
