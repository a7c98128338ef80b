"""Which backend of the dispatch a compiled program holds, and which one it should."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.moe.dispatch import BACKENDS, default_backend
from moe_diffusion.moe.routing import Routing
from moe_diffusion.planning.hlo import Program, kernels


@dataclass(frozen=True)
class Dispatch:
    """backend: found in the program. kernels: Pallas kernel -> calls in the program's text."""

    backend: str | None
    wanted: str | None
    kernels: dict[str, int]

    @property
    def as_intended(self) -> bool:
        return self.backend == self.wanted

    def describe(self) -> str:
        if self.wanted is None:
            return "none, a dense model"
        calls = sum(self.kernels.values())
        text = f"{self.backend}, {f'{calls} calls of our kernels' if calls else 'plain XLA'}"
        return text if self.as_intended else f"{text}; NOT {self.wanted}, which is meant for it"


def dispatch_of(
    program: Program, model: nn.Module, config: ConfigDict, what: str, platform: str
) -> Dispatch:
    """What the text of a program tells of the dispatch of a model (`config.model`).

    A backend is recognised by the file of its name, moe_diffusion/kernels/<backend>.py, among those
    that the program's operations come from.
    """
    if config.router.name == "dense":
        return Dispatch(None, None, {})
    wanted = config.moe.backend
    if wanted == "auto":
        train = what == "train"
        dropout = train and config.moe.dropout > 0
        wanted = default_backend(platform, _routing(model, train), dropout)
    found = {Path(file).stem for file in program.files if "moe_diffusion/kernels/" in file}
    others = [name for name in BACKENDS if name in found]
    return Dispatch(wanted if wanted in found else ", ".join(others), wanted, kernels(program))


def _routing(model: nn.Module, train: bool) -> Routing:
    """The kind of routing that the model's router makes; nothing is computed."""
    router, tokens = model.make_moe().make_router(), model.grid[0] * model.grid[1]
    x = jax.ShapeDtypeStruct((1, 8 * tokens, model.hidden_size), "float32")
    is_null = jax.ShapeDtypeStruct((1, 8 * tokens), "bool")

    def route(key, x, is_null):
        return router.init_with_output(key, x, is_null, train)[0][0]

    return jax.eval_shape(route, jax.random.key(0), x, is_null)
