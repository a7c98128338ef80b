"""FLUX.1-Lite (Freepik/flux.1-lite-8B-alpha): FLUX.1 [dev] with 8 double and 38 single blocks.

A baseline of Dense2MoE (2510.09094, Table 1; 8.16B parameters). Argument: pixels=1024.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import flux
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = flux("flux_lite", True, parse_arg(arg, pixels=1024).pixels)
    config.model.depth = 8
    return config
