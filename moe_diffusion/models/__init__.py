"""From a config to a model: `build(config.model)`; and the shapes of its variables.

An architecture is a module with

    FIELDS: {"bottleneck": (128, "what it means"), ...}   keys of the config section
                                                          model.<architecture>, defaults, comments
    check(config.model)                                   raises UserError for impossible values
    build(config.model, losses) -> model

and one line in ARCHITECTURES.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError

ARCHITECTURES = {
    "dit": "moe_diffusion.models.dit",
    "jit": "moe_diffusion.models.jit",
}


def architecture(name: str) -> ModuleType:
    """The module of an architecture, imported when it is asked for. Raises UserError."""
    if name not in ARCHITECTURES:
        raise UserError(
            f"model.architecture = {name!r} is unknown; choose {' | '.join(ARCHITECTURES)}"
        )
    return importlib.import_module(ARCHITECTURES[name])


def build(config: ConfigDict, losses: Sequence[str] = ()) -> nn.Module:
    """The model that `config` (the `model` section of a config) describes.

    Args:
      losses: names of the auxiliary losses that its routers shall return, those of
        `config.loss_weights`.

    Raises:
      UserError: unknown architecture or router, or a loss that the router does not have.
        Combinations of numbers are checked by `config.validate`, which every command line calls.
    """
    return architecture(config.architecture).build(config, tuple(losses))


def abstract_variables(model: nn.Module) -> dict:
    """Shapes of params and router_state (if there is one), as trees of ShapeDtypeStruct."""
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, model.channels), "float32")
    time, label = jax.ShapeDtypeStruct((1,), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    init = partial(model.init, train=False)
    variables = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), image, time, label))
    return {name: tree for name, tree in variables.items() if name in ("params", "router_state")}
