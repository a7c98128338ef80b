"""FLUX-Mini (TencentARC/flux-mini): FLUX.1 [dev] with 5 double and 10 single blocks.

A baseline of Dense2MoE (2510.09094, Table 1; 3.18B parameters, 50 steps). Argument: pixels=1024.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import flux_moe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    pixels = parse_arg(arg, pixels=1024).pixels
    return flux_moe("flux_mini", None, adaln_rank=0, depth=(5, 10), pixels=pixels)
