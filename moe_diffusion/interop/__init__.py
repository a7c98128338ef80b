"""Exchange of weights with the authors' PyTorch code.

model, variables = interop.load_torch("DSMoE-L-E48.pt", "dsmoe", hparams)
interop.save_torch(model, variables, "DSMoE-L-E48.safetensors", "dsmoe")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from moe_diffusion import models
from moe_diffusion.errors import UserError
from moe_diffusion.interop import families, files, keymap
from moe_diffusion.interop.families import config_from_torch, model_config_from_torch
from moe_diffusion.interop.tensors import listed
from moe_diffusion.models.flux import Flux
from moe_diffusion.models.jit import JiT
from moe_diffusion.moe import routers

__all__ = [
    "config_from_torch",
    "export_state_dict",
    "family_of",
    "import_state_dict",
    "load_torch",
    "model_config_from_torch",
    "save_torch",
]


def import_state_dict(
    state: Mapping[str, Any], model: nn.Module, family: str
) -> dict[str, dict[str, Any]]:
    """PyTorch's state dict (arrays) -> {"params": ..., "router_state": ...}, numpy leaves.

    Parameters get the model's dtype (`model.param_dtype`), whatever dtype the tensors have.

    Raises:
      UserError: unknown family, or keys that are missing, unexpected or misshaped (all in one).
    """
    return keymap.import_tree(state, families.family(family), model)


def export_state_dict(
    variables: Mapping[str, Any], model: nn.Module, family: str | None = None
) -> dict[str, np.ndarray]:
    """Our variables -> a complete PyTorch state dict under the authors' names, buffers included.

    Tensors have the dtype of our leaves.

    Args:
      variables: {"params": ..., "router_state": ...}, the second only if the model has one.
      family: None takes `family_of(model)`.

    Raises:
      UserError: a variable is missing, or has no name in that family.
    """
    chosen = families.family(family or family_of(model))
    state = keymap.export_tree(
        {name: variables.get(name, {}) for name in ("params", "router_state")}, chosen, model
    )
    needed = {e.key for e in keymap.entries(chosen, model, keymap.abstract_variables(model))}
    if lacking := sorted(needed - set(state)):
        raise UserError(f"the variables lack {listed(lacking)}")
    return state | keymap.constants(chosen, model)


def load_torch(
    path: str | os.PathLike,
    family: str,
    hparams: Mapping[str, Any],
    *,
    losses: tuple[str, ...] = (),
    weights: str | None = None,
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Builds the model that `hparams` (the authors' names) describe and reads its weights.

    Args:
      losses: auxiliary losses that the model returns; needed to continue its training.
      weights: which state dict of a `.pt` file that holds several, for example "ema".
    """
    model = models.build(model_config_from_torch(family, hparams), losses=losses)
    return model, import_state_dict(files.read_state_dict(path, weights), model, family)


def save_torch(
    model: nn.Module,
    variables: Mapping[str, Any],
    path: str | os.PathLike,
    family: str | None = None,
    hparams: Mapping[str, Any] | None = None,
) -> None:
    """Writes a `.safetensors` file that the authors' code loads; see `export_state_dict`.

    hparams: hyperparameters for its header, where `convert` finds those of family flux_moe.
    """
    files.write_state_dict(export_state_dict(variables, model, family), path, hparams)


def family_of(model: nn.Module) -> str:
    """The family of a model, by the model's class, its router and the router's selection bias."""
    router = next(iter(model.routers().values()), None)
    if isinstance(model, Flux):
        experts = any(block.kind.endswith("_moe") for block in model.blocks())
        return "flux_moe" if experts or model.adaln_rank or model.mixture.groups else "flux"
    if isinstance(model, JiT):
        return "jit" if router is None else "jitmoe"
    if router is None:
        return "dit"
    if isinstance(router, routers.TokenChoice):
        if router.selection_bias:
            return "dsmoe"
        gated = any(path.endswith("/moe/experts/gate") for path in keymap.abstract_variables(model))
        everywhere = all(block.kind == "moe" for block in model.blocks())
        return "dit_moe" if gated and everywhere else "tcdit"
    return {
        routers.ExpertChoice: "ecdit",
        routers.DiffMoE: "diffmoe",
        routers.ProMoETokenChoice: "promoe_tc",
        routers.ProMoEExpertChoice: "promoe_ec",
    }[type(router)]
