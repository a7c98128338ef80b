"""All families of PyTorch checkpoints that can be read and written, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_diffusion import config as config_lib
from moe_diffusion.config.defaults import COMPUTATION
from moe_diffusion.errors import UserError, explained
from moe_diffusion.interop import dit, dit_moe, flux, flux_moe, jit, promoe
from moe_diffusion.interop.rows import Family

FAMILIES: dict[str, Family] = {
    **dit.FAMILIES,
    **dit_moe.FAMILIES,
    **promoe.FAMILIES,
    **jit.FAMILIES,
    **flux.FAMILIES,
    **flux_moe.FAMILIES,
}
# No weight depends on these keys either, and hyperparameters do not have them.
_FREE = (*COMPUTATION, "model.image_size", "model.image_width", "model.param_dtype")
_FREE += ("model.flux.text_tokens", "model.flux.text_dtype", "model.num_classes")
_FREE += ("model.router.kernel_init", "model.router.group", "model.router.balance_gates")


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


def torch_from_config(name: str, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """The hyperparameters that an export of a config's model needs beside its weights.

    Returns:
      What `config_from_torch` makes that model of; None if the family's files have none.

    Raises:
      UserError: the family cannot say what the model is.
    """
    chosen = family(name)
    if chosen.hparams is None:
        return None
    hparams = chosen.hparams(config.model)
    again = config.copy_and_resolve_references()
    again.model = model_config_from_torch(name, hparams)
    free = _FREE if again.model.router.name != "dense" else (*_FREE, "model.moe.", "model.router.")
    changes = [c for c in config_lib.differences(again, config) if not c.key.startswith(free)]
    if changes:
        texts = [f"{c.key} = {c.new} (it has {c.old})" for c in changes]
        raise UserError(f"family {name} has no model with {', '.join(texts)}: it cannot be written")
    return hparams
