"""FLUX.1 [schnell] (black-forest-labs/FLUX.1-schnell; 11.9B parameters): four steps, no guidance.

    python -m moe_diffusion.convert --family flux --input flux1-schnell.safetensors \\
      --output runs/flux_schnell

Argument: pixels=1024, the side of the images, a multiple of 16.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import flux
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    return flux("flux_schnell", False, parse_arg(arg, pixels=1024).pixels)
