"""The authors' hyperparameters -> our model config.

The names, defaults and rules are those of the constructors in the authors' repositories:
DiT and SiT (models.py), DSMoE and DiffMoE (models/models_*.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_diffusion.errors import UserError, shown
from moe_diffusion.reading import Key, key_like

_NOTHING = type(None)
MAYBE_TABLE = Key((dict, _NOTHING), None)
MAYBE_SIZE = Key((int, _NOTHING), None, least=0)
MAYBE_BOOL = Key((bool, _NOTHING), None)
SIZE = Key((int,), least=0)  # without a default
# A value that no network depends on; it may be what the authors' code takes.
UNUSED = Key((bool, float, str, list, dict, _NOTHING), None)

# A table of known keys: name -> default, whose kind the value must have, or what else it may be.
_COMMON = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "use_swiglu": False,
    "head_dim": MAYBE_SIZE,
    "rf": MAYBE_BOOL,
}
_MOE_COMMON = {
    "MoE_config": MAYBE_TABLE,
    "CapacityPred_loss_weight": UNUSED,
    "init_MoeMLP": UNUSED,
    "use_capacity_schedule": UNUSED,
}
_DSMOE = {
    "rope_type": "none",
    "use_sinks": False,
    "sliding_window": UNUSED,
    "enable_gqa": False,
    "norm_type": "layernorm",
    "use_kda": False,
    "kda_kwargs": UNUSED,
}
# Keys of MoE_config. Some keys do not change the network: how the experts are initialised,
# schedules, and fields that the family's code never reads.
_TOKEN_OR_EXPERT_CHOICE = {
    "num_experts": SIZE,
    "capacity": Key((float,), least=0),
    "n_shared_experts": MAYBE_SIZE,
    "interleave": True,
    "init_MoeMLP": UNUSED,
    "capacity_schedule": UNUSED,
}
_MOE_CONFIG = {
    "dsmoe": {
        "num_experts": SIZE,
        "moe_intermediate_size": SIZE,
        "num_experts_per_tok": SIZE,
        "hidden_size": MAYBE_SIZE,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_shared_expert": False,
        "interleave": True,
        "skip_first2": Key((bool, int, _NOTHING), False, least=0),
        "skip_last2": UNUSED,
        "capacity": UNUSED,
        "init_MoeMLP": UNUSED,
        "capacity_schedule": UNUSED,
        "use_type": UNUSED,
        "group_bins": UNUSED,
        "local_top_p": UNUSED,
    },
    "tcdit": _TOKEN_OR_EXPERT_CHOICE,
    "ecdit": _TOKEN_OR_EXPERT_CHOICE,
    "diffmoe": _TOKEN_OR_EXPERT_CHOICE,
}


def configure(family: str, hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Sets `config` to a network of the family dit | sit | dsmoe | tcdit | ecdit | diffmoe.

    Keys that no checkpoint shows keep our default, like `dtype` and `remat`. Guidance is that of
    the authors' samplers: one pass of both predictions with three guided channels
    (`forward_with_cfg`) for DDPM and SiT, two passes with all channels for the other flows.

    Args:
      hparams: arguments of the authors' constructor under their names; those left out take the
        authors' default. The further key `rf`, which no weight shows, is true for a rectified flow
        and false for a DDPM. Without it a dit is a DDPM, and the other families are flows.

    Raises:
      UserError: a key is unknown, a key without default is left out, a value is of the wrong kind,
        or an option has no counterpart here.
    """
    known = dict(_COMMON)
    if family in _MOE_CONFIG:
        known |= _MOE_COMMON
    if family == "dsmoe":
        known |= _DSMOE
    h = fill("model", known, hparams)
    _set_model(config.model, h, family)
    config.diffusion.cond_dropout = float(h["class_dropout_prob"])
    # A DDPM without learned variance is not among our samplers.
    if h["rf"] is False or (h["rf"] is None and family == "dit" and h["learn_sigma"]):
        config.diffusion.path = "ddpm"
        config.sampling.update(sampler="ddpm", steps=250)
    if family == "sit" or config.diffusion.path == "ddpm":
        config.sampling.update(cfg_channels=3, joint=True)


def _set_model(model: ml_collections.ConfigDict, h: Mapping[str, Any], family: str) -> None:
    model.image_size = h["input_size"]
    model.channels = h["in_channels"]
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes", "learn_sigma"):
        model[name] = h[name]
    model.mlp_ratio = float(h["mlp_ratio"])
    if h["head_dim"] not in (None, h["hidden_size"] // h["num_heads"]):
        raise UserError(f"head_dim {h['head_dim']} is not hidden_size / num_heads: unsupported")
    if family in ("dit", "sit"):
        model.router.name = "dense"
        _set_dense_mlp(model, h)
        return
    moe = fill("MoE_config", _MOE_CONFIG[family], h["MoE_config"] or {})
    model.moe.num_experts = moe["num_experts"]
    model.moe.interleave = moe["interleave"]
    (_set_dsmoe if family == "dsmoe" else _set_choice)(model, h, moe, family)


def _set_dsmoe(model, h, moe, family) -> None:
    """DSMoE: DeepSeek-V3's router, SwiGLU experts, SiLU in the dense blocks' MLP."""
    if h["use_sinks"]:
        raise UserError("use_sinks (attention sinks) is not supported; no published model has it")
    if h["use_kda"]:
        raise UserError("use_kda (Kimi delta attention in place of softmax) is not supported")
    if moe["hidden_size"] not in (None, h["hidden_size"]):
        raise UserError(
            f"MoE_config.hidden_size is {moe['hidden_size']}, but hidden_size is {h['hidden_size']}"
        )
    positions = {"none": "sincos", "1d": "rope1d", "2d": "rope2d"}
    if h["rope_type"] not in positions:
        raise UserError(f"rope_type is {shown(h['rope_type'])}; known: {', '.join(positions)}")
    model.positions = positions[h["rope_type"]]
    model.norm = h["norm_type"]
    model.num_kv_heads = h["num_heads"] // 2 if h["enable_gqa"] else 0
    model.mlp = "silu"
    skip = moe["skip_first2"]
    model.moe.update(
        hidden_size=moe["moe_intermediate_size"],
        mlp="swiglu",
        bias=False,
        shared_hidden_size=moe["moe_intermediate_size"] if moe["use_shared_expert"] else 0,
        shared_mlp="swiglu",
        shared_bias=False,
        residual_input=not moe["use_shared_expert"],
        skip_first=2 * skip if isinstance(skip, bool) else skip or 0,
    )
    model.router.update(
        name="token_choice",
        top_k=moe["num_experts_per_tok"],
        scores="sigmoid",
        normalize=moe["num_experts_per_tok"] > 1,
        scale=float(moe["routed_scaling_factor"]),
        selection_bias=True,
        n_group=moe["n_group"],
        topk_group=moe["topk_group"],
        kernel_init="kaiming_normal",
    )


def _set_dense_mlp(model, h) -> None:
    model.mlp = "swiglu" if h["use_swiglu"] else "gelu"
    model.mlp_bias = not h["use_swiglu"]


def _set_choice(model, h, moe, family) -> None:
    """TC-DiT, EC-DiT, DiffMoE: experts and dense blocks share one kind of MLP and its width."""
    _set_dense_mlp(model, h)
    model.moe.update(
        hidden_size=int(h["hidden_size"] * h["mlp_ratio"]), mlp=model.mlp, bias=model.mlp_bias
    )
    if moe["n_shared_experts"]:
        # One shared MLP. DiffMoE's is always a GELU MLP, 8 times as wide as the model.
        wide = family == "diffmoe"
        model.moe.update(
            shared_hidden_size=h["hidden_size"] * (8 if wide else moe["n_shared_experts"]),
            shared_mlp="gelu" if wide else "swiglu",
            shared_bias=wide,
        )
    if family == "tcdit":
        # MoE_config.capacity is the number of experts of a token here.
        model.router.update(
            name="token_choice",
            top_k=moe["capacity"],
            scores="softmax",
            normalize=False,
            kernel_init="kaiming_uniform",
        )
        return
    model.router.update(
        name="expert_choice" if family == "ecdit" else "diffmoe",
        capacity=float(moe["capacity"]),
        group="sample" if family == "ecdit" else "batch",
        kernel_init="normal_0.006",
    )
    if family == "diffmoe":
        model.router.max_capacity = 0.0  # the authors' experts take all that the thresholds allow


def fill(where: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Completes `given` by the defaults of `known`.

    Args:
      where: name of the table, for messages.
      known: name -> default, or a `reading.Key`. A value must be of the default's kind; one of type
        bool may be 0 or 1.

    Raises:
      UserError: a key is unknown or left out although it has no default, or a value is not as its
        key says.
    """
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:100], known, n=1, cutoff=0.0)[0]
            raise UserError(
                f"unknown hyperparameter {shown(key)} in {where}; the nearest is '{near}'"
            )
    keys = {name: key if isinstance(key, Key) else key_like(key) for name, key in known.items()}
    filled = {name: given.get(name, key.default) for name, key in keys.items()}
    lacking = [name for name, value in filled.items() if value is ...]
    if lacking:
        raise UserError(f"{where} lacks the hyperparameter(s) {', '.join(lacking)}")
    for name in given:
        keys[name].check(filled[name], f"{where}.{name}", "correct the hyperparameters")
        if keys[name].kinds == (bool,):
            filled[name] = bool(filled[name])
    return filled


def without_default(known: Mapping[str, Any]) -> list[str]:
    """The names of a table for `fill` that must be given."""
    return [name for name, key in known.items() if isinstance(key, Key) and key.default is ...]
