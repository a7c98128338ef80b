"""From a config to a model: `build(config.model)`.

An architecture is a module with

    FIELDS: {"bottleneck": (128, "what it means"), ...}   keys of the config section
                                                          model.<architecture>, defaults, comments
    check(config.model)                                   raises UserError for impossible values
    build(config.model, losses) -> model

and one line in ARCHITECTURES. It also has num_blocks(config.model) if model.depth does not count
all of its blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model, abstract_variables

__all__ = ["ARCHITECTURES", "abstract_variables", "architecture", "build", "num_blocks"]

ARCHITECTURES = {
    "dit": "moe_diffusion.models.dit",
    "dit_t2i": "moe_diffusion.models.dit_t2i",
    "jit": "moe_diffusion.models.jit",
    "flux": "moe_diffusion.models.flux",
}


def architecture(name: str) -> ModuleType:
    """The module of an architecture, imported when it is asked for. Raises UserError."""
    if name not in ARCHITECTURES:
        raise UserError(
            f"model.architecture = {name!r} is unknown; choose {' | '.join(ARCHITECTURES)}"
        )
    return importlib.import_module(ARCHITECTURES[name])


def num_blocks(config: ConfigDict) -> int:
    """How many blocks the model of a section `model` has, of all kinds."""
    count = getattr(architecture(config.architecture), "num_blocks", None)
    return count(config) if count else config.depth


def build(config: ConfigDict, losses: Sequence[str] = ()) -> Model:
    """The model that `config` (the `model` section of a config) describes.

    Args:
      losses: names of the auxiliary losses that its routers shall return, those of
        `config.loss_weights`.

    Raises:
      UserError: unknown architecture or router, or a loss that the router does not have.
        Combinations of numbers are checked by `config.validate`, which every command line calls.
    """
    return architecture(config.architecture).build(config, tuple(losses))
