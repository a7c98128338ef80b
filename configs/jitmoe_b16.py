"""JiTMoE-B/16-E16 (arXiv 2512.01252; its authors' model_jit.py) on ImageNet at 256 x 256 pixels.

python -m moe_diffusion.train --config configs/jitmoe_b16.py --workdir runs/jitmoe_b16
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.jit import jit
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    return jit("B", 16, experts=16)
