"""A tiny FLUX.1 that draws handwritten digits (8x8, ship with scikit-learn) from written prompts.

    python -m moe_diffusion.demo --config configs/digits_flux.py --workdir runs/digits_flux

Four double and ten single blocks, of which groups of three and five can be made. It learns to read
"a handwritten seven" and "the digit 7, written by hand" while it trains; see
moe_diffusion/digit_prompts.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import digits
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    return digits()
