"""FLUX-Mini (TencentARC/flux-mini): FLUX.1 [dev] with 5 double and 10 single blocks.

A baseline of Dense2MoE (2510.09094, Table 1; 3.18B parameters, 50 steps). Argument: pixels=1024.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import flux
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = flux("flux_mini", True, parse_arg(arg, pixels=1024).pixels)
    config.model.depth, config.model.flux.single_depth = 5, 10
    config.sampling.steps = 50
    return config
