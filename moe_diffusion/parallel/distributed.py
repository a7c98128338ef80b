"""Several processes that train as one."""

from __future__ import annotations

import jax

from moe_diffusion.clusters import initialize

__all__ = ("initialize", "is_main_process")


def is_main_process() -> bool:
    """True on the one process that writes files and prints."""
    return jax.process_index() == 0
