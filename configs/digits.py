"""Handwritten digits (8x8, ships with scikit-learn): minutes on a laptop, for every router.

    python -m moe_diffusion.train --config configs/digits.py:router=diffmoe --workdir runs/diffmoe

Arguments: router=token_choice | expert_choice | diffmoe | expert_race | deepseek | dense,
size=tiny | small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.families.digits import DIGITS_ROUTERS, digits
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    choices = {"router": DIGITS_ROUTERS, "size": ("tiny", "small")}
    arg = parse_arg(arg, choices=choices, router="token_choice", size="tiny")
    return digits(arg.router, arg.size)


def sweep() -> Iterator[dict[str, Any]]:
    """The five routers that have experts, for `launch/xm_launch.py --sweep`."""
    for router in DIGITS_ROUTERS:
        if router != "dense":
            yield {"arg": f"router={router}"}
