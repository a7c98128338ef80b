"""JiTMoE-H/16-E16 (arXiv 2512.01252; its authors' model_jit.py) on ImageNet at 256 x 256 pixels.

    python -m moe_diffusion.train --config configs/jitmoe_h16.py --workdir runs/jitmoe_h16

In the authors' code, but without a published result. The only one with dropout in its experts, 0.2.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.jit import jit


def get_config(arg: str | None = None) -> ConfigDict:
    return jit("H", 16, arg, experts=16)
