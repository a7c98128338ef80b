"""All families of PyTorch checkpoints that can be read and written, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_diffusion import config as config_lib
from moe_diffusion.errors import UserError, explained
from moe_diffusion.interop import dit, dit_moe, flux, jit, promoe
from moe_diffusion.interop.rows import Family

FAMILIES: dict[str, Family] = {
    **dit.FAMILIES,
    **dit_moe.FAMILIES,
    **promoe.FAMILIES,
    **jit.FAMILIES,
    **flux.FAMILIES,
}


def family(name: str) -> Family:
    """The family of that name. Raises UserError, which lists the known ones."""
    if name not in FAMILIES:
        raise UserError(f"unknown family '{name}'; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def config_from_torch(name: str, hparams: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Makes a config (model, diffusion, sampling) from hyperparameters in the authors' names.

    Raises:
      UserError: unknown family or key, a key without default left out, a value of the wrong kind,
        an impossible combination, or an option that has no counterpart here.
    """
    config, chosen = config_lib.default(), family(name)
    # What is left is arithmetic with impossible sizes, and a fraction where a whole number belongs.
    kinds = (TypeError, ArithmeticError)
    with explained(f"hyperparameters of {name} are impossible", "correct them", kinds):
        chosen.configure(hparams, config)
    config = config_lib.settle(config)
    config_lib.validate(config)
    return config


def model_config_from_torch(name: str, hparams: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The `model` section of `config_from_torch`."""
    return config_from_torch(name, hparams).model
