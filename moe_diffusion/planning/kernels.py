"""Which dispatch backends a model chooses and why, and which ones a compiled program contains."""

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
    """The dispatch backends in a compiled program, beside those that the model chose.

    Attributes:
      backend: found in the program. Several are joined by commas; None for a dense model.
      wanted: chosen by the model, in the same form.
      kernels: our kernel -> how often the program's text calls it.
      why: the reason for `wanted`.
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
    """The dispatch backends that the layers of a model choose on a platform.

    Args:
      config: the section `model` of the model's config.

    Returns:
      Backend -> why it was chosen (see `dispatch.choose_backend`); {} for a dense model.

    Raises:
      UserError: the backend that the config names does not suit.
    """
    dtype, dropout = jnp.dtype(model.dtype).name, train and config.moe.dropout > 0
    name = None if config.moe.backend == "auto" else config.moe.backend
    # With top_k = 0 the shared experts are all there is, and nothing is dispatched.
    routers = [router for router in model.routers().values() if router.experts_per_token]
    routings = [_routing(router, train) for router in routers]
    return dict(choose_backend(platform, r, dtype, dropout, name) for r in routings)


def dispatch_line(model: Model, config: ConfigDict, platform: str) -> str:
    """One line that says how a model dispatches when it trains on a platform, and why."""
    found = backends_of(model, config, platform)
    return f"dispatch of experts: {_text(found) or 'none, a dense model'}"


def dispatch_of(
    program: Program, model: Model, config: ConfigDict, what: str, platform: str
) -> Dispatch:
    """Compares the backends in a compiled program ("train" or "sample") with the chosen ones.

    The program lists the Python files that its operations come from. A backend is in the program
    if one of its own files (`Backend.source`) is listed.
    """
    wanted = backends_of(model, config, platform, train=what != "sample")
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
    """The shapes of the routing that a router returns; nothing is computed."""
    tokens = 64 * router.num_experts  # enough for at least one slot of every expert
    x = jax.ShapeDtypeStruct((1, tokens, 8), "float32")
    is_null = jax.ShapeDtypeStruct((1, tokens), "bool")

    def route(key, x, is_null):
        return router.init_with_output(key, x, is_null, train)[0][0]

    return jax.eval_shape(route, jax.random.key(0), x, is_null)
