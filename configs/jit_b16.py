"""JiT-B/16 (arXiv 2511.13720, Table 9) on ImageNet at 256 x 256 pixels.

    python -m moe_diffusion.train --config configs/jit_b16.py --workdir runs/jit_b16

Equal training (families/settings.py): setting=dsmoe_table4.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.jit import jit


def get_config(arg: str | None = None) -> ConfigDict:
    return jit("B", 16, arg)
