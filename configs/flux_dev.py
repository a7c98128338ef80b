"""FLUX.1 [dev] (black-forest-labs/FLUX.1-dev; 11.9B parameters), distilled for guidance scales.

    python -m moe_diffusion.convert --family flux --input flux1-dev.safetensors \\
      --output runs/flux_dev

Argument: pixels=1024, the side of the images, a multiple of 16.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import flux
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    return flux("flux_dev", True, parse_arg(arg, pixels=1024).pixels)
