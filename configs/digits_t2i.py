"""Two handwritten digits side by side from prompts like "a three left of a seven", in minutes.

    python -m moe_diffusion.train --config configs/digits_t2i.py:router=diffmoe --workdir runs/pairs

A small DiT with cross-attention that learns to read while it trains; see
moe_diffusion/digit_pairs.py. Arguments: router=diffmoe | dense | token_choice | expert_choice,
seed=0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.families.t2i import ROUTERS, digits_t2i
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"router": ROUTERS}, router="diffmoe", seed=0)
    return digits_t2i(arg.router, arg.seed)


def sweep() -> Iterator[dict[str, Any]]:
    """Every router with three seeds, for `launch/xm_launch.py --sweep`."""
    for router in ROUTERS:
        for seed in range(3):
            yield {"arg": f"router={router},seed={seed}"}
