"""Mixture-of-Experts diffusion transformers in JAX/Flax.

    import moe_diffusion
    pipe = moe_diffusion.load("runs/digits")
    images = pipe(labels=[3, 7], cfg=2.0, steps=50, seed=0)

docs/python.md shows what else can be used from Python. The names below are imported when they are
first used, so that the package itself needs no jax.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Short name -> (module, name there).
_PLACES = {
    "Aux": ("moe.router", "Aux"),
    "Field": ("conditions", "Field"),
    "MoE": ("moe.layer", "MoE"),
    "Pipeline": ("sampling.pipeline", "Pipeline"),
    "Router": ("moe.router", "Router"),
    "Routing": ("moe.routing", "Routing"),
    "UserError": ("errors", "UserError"),
    "build": ("models", "build"),
    "dispatch": ("moe.dispatch", "dispatch"),
    "load": ("sampling.pipeline", "load"),
    "load_config": ("config", "load"),
    "load_torch": ("interop", "load_torch"),
    "make_loss": ("diffusion.objectives", "make_loss"),
    "make_sampler": ("diffusion.samplers", "make_sampler"),
    "save_torch": ("interop", "save_torch"),
    "to_nnx": ("interop.nnx_bridge", "to_nnx"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _PLACES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), there)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
