"""FLUX.1-Lite (Freepik/flux.1-lite-8B-alpha): FLUX.1 [dev] with 8 double and 38 single blocks.

A baseline of Dense2MoE (2510.09094, Table 1; 8.16B parameters). Argument: pixels=1024.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux_moe import flux_moe
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    pixels = parse_arg(arg, pixels=1024).pixels
    return flux_moe("flux_lite", None, adaln_rank=0, depth=(8, 38), pixels=pixels)
