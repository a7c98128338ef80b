"""Which backends of the dispatch a model takes and why, and which a compiled program holds."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_diffusion.models.stack import Model
from moe_diffusion.moe.dispatch import BACKENDS, choose_backend
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routing import Routing
from moe_diffusion.planning.hlo import Program, kernels


@dataclass(frozen=True)
class Dispatch:
    """The dispatch in a compiled program.

    backend: found in the program; wanted: chosen for it, because of `why`. Several are joined by
    commas; None: a dense model.
    kernels: calls in the program's text, by kernel of ours.
    """

    backend: str | None
    wanted: str | None
    kernels: dict[str, int]
    why: str = ""

    @property
    def as_intended(self) -> bool:
        return self.backend == self.wanted

    def describe(self) -> str:
        if self.wanted is None:
            return "none, a dense model"
        calls = sum(self.kernels.values())
        found = f"{calls} calls of our kernels" if calls else "no call of our kernels"
        if self.as_intended:
            return f"{self.why}: {found}"
        return f"{self.backend}: {found}; NOT {self.wanted}, which is meant for it"


def backends_of(
    model: Model, config: ConfigDict, platform: str, train: bool = True
) -> dict[str, str]:
    """The backends that the layers of a model (`config.model`) take on a platform, and why.

    Returns name -> why, see `dispatch.choose_backend`; {} for a dense model. Raises UserError if
    the backend that the config names does not suit.
    """
    dtype, dropout = jnp.dtype(model.dtype).name, train and config.moe.dropout > 0
    name = None if config.moe.backend == "auto" else config.moe.backend
    routings = [_routing(router, train) for router in model.routers().values()]
    return dict(choose_backend(platform, r, dtype, dropout, name) for r in routings)


def dispatch_line(model: Model, config: ConfigDict, platform: str) -> str:
    """One line on how a model that trains on a platform dispatches, and why."""
    found = backends_of(model, config, platform)
    return f"dispatch of experts: {_text(found) or 'none, a dense model'}"


def dispatch_of(
    program: Program, model: Model, config: ConfigDict, what: str, platform: str
) -> Dispatch:
    """Compares the backends that a program ("train" or "sample") holds with the chosen ones.

    A backend is recognised by its files (`Backend.source`) among those that the program's
    operations come from.
    """
    wanted = backends_of(model, config, platform, train=what == "train")
    if not wanted:
        return Dispatch(None, None, {})
    found = [
        name
        for name, backend in BACKENDS.items()
        if any(f"moe_diffusion/kernels/{backend.source}" in file for file in program.files)
    ]
    backend = ", ".join(wanted if set(wanted) <= set(found) else found)
    return Dispatch(backend, ", ".join(wanted), kernels(program), _text(wanted))


def _text(backends: dict[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in backends.items())


def _routing(router: Router, train: bool) -> Routing:
    """The kind of routing that a router makes; nothing is computed."""
    tokens = 64 * router.num_experts  # enough for at least one slot of every expert
    x = jax.ShapeDtypeStruct((1, tokens, 8), "float32")
    is_null = jax.ShapeDtypeStruct((1, tokens), "bool")

    def route(key, x, is_null):
        return router.init_with_output(key, x, is_null, train)[0][0]

    return jax.eval_shape(route, jax.random.key(0), x, is_null)
