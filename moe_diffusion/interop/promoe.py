"""ProMoE (2510.24711), token choice and expert choice: key map and hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_collections

from moe_diffusion.errors import UserError, shown
from moe_diffusion.interop import shapes
from moe_diffusion.interop.dit import BLOCK, MOE, TABLE, TRUNK, linear
from moe_diffusion.interop.hparams import MAYBE_SIZE, SIZE, UNUSED, fill
from moe_diffusion.interop.rows import LINEAR, SAME, Family, Row
from moe_diffusion.reading import Key

_EXPERT = "blocks.{i}.mlp.experts.{e}"
_ROWS = (
    *TRUNK,
    *(
        Row(f"blocks.{{i}}.attn.{norm}.{theirs}", f"{BLOCK}/attn/{norm}/{ours}", SAME)
        for norm in ("q_norm", "k_norm")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    Row("blocks.{i}.mlp.cluster_centers", f"{MOE}/router/kernel", LINEAR),
    Row(f"{_EXPERT}.up_proj.weight", f"{MOE}/experts/up", LINEAR),
    Row(f"{_EXPERT}.up_proj.bias", f"{MOE}/experts/up_bias", SAME),
    Row(f"{_EXPERT}.down_proj.weight", f"{MOE}/experts/down", LINEAR),
    Row(f"{_EXPERT}.down_proj.bias", f"{MOE}/experts/down_bias", SAME),
    *linear("blocks.{i}.mlp.shared_expert.up_proj", f"{MOE}/shared/up"),
    *linear("blocks.{i}.mlp.shared_expert.down_proj", f"{MOE}/shared/down"),
)

_HPARAMS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "qk_norm": False,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "use_swiglu": False,
    "MoE_config": Key((dict,)),
    "head_dim": MAYBE_SIZE,
}
# norm_topk_prob and seq_aux have no effect in the code.
_MOE_CONFIG = {
    "num_routed_experts": SIZE,
    "moe_intermediate_size": SIZE,
    "shared_expert_intermediate_size": SIZE,
    "interleave": Key((bool,)),
    "load_balance_loss_coef": 0.0,
    "norm_topk_prob": UNUSED,
    "seq_aux": UNUSED,
    "use_shared_expert": True,
    "use_uncond_expert": True,
    "init_MoeMLP": False,
    "router_weight_mode": "softmax",
    "routing_contrastive_lam": 0.0,
    "use_top_k_for_routing_contrastive": False,
    "routing_contrastive_temperature": 0.1,
}


def configure(family: str, hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Sets `config` to a network of the family promoe_tc | promoe_ec and its training.

    Args:
      hparams: arguments of the authors' constructor, which is the same for both families; or the
        content of one of their yaml files. Its section `DiT_<size>_config` has no sizes, because
        those are in the authors' config.py.
    """
    h = fill("model", _HPARAMS, _from_yaml(family, hparams))
    known = {**_MOE_CONFIG, "top_k": 2 if family == "promoe_tc" else 1}
    moe = fill("MoE_config", known, h["MoE_config"])
    _refuse(family, h, moe)
    model = config.model
    model.image_size, model.channels = h["input_size"], h["in_channels"]
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes", "learn_sigma"):
        model[name] = h[name]
    model.mlp_ratio = float(h["mlp_ratio"])
    model.time_scale, model.dit.reverse_time = 1000.0, True
    model.residual_dtype = "float32"  # the position table, in float32, is added out of place
    if h["qk_norm"]:  # torch.nn.LayerNorm over a head, as it is by default
        model.update(qk_norm=True, qk_norm_kind="layernorm_affine", qk_norm_eps=1e-5)
    model.moe.update(
        num_experts=moe["num_routed_experts"] + moe["use_uncond_expert"],
        hidden_size=moe["moe_intermediate_size"],
        mlp="gelu",
        bias=True,
        shared_hidden_size=moe["use_shared_expert"] * moe["shared_expert_intermediate_size"],
        shared_mlp="gelu",
        shared_bias=True,
        interleave=moe["interleave"],
    )
    model.router.update(
        name=family,
        top_k=moe["top_k"],  # the name in token choice
        capacity=float(moe["top_k"]),  # the name in expert choice
        group="sample",
        scores=moe["router_weight_mode"],
        null_expert=moe["use_uncond_expert"],
        contrast_temperature=float(moe["routing_contrastive_temperature"]),
        kernel_init="normal_0.02",
    )
    if moe["routing_contrastive_lam"]:
        config.loss_weights.contrast = float(moe["routing_contrastive_lam"])
    config.diffusion.update(
        cond_dropout=float(h["class_dropout_prob"]), time_sampling="logit_normal"
    )
    config.sampling.update(sampler="euler", steps=250, cfg=1.5)


def _refuse(family: str, h: Mapping[str, Any], moe: Mapping[str, Any]) -> None:
    """Raises a UserError for options that we do not support; no published model has them."""
    if h["use_swiglu"]:
        raise UserError("use_swiglu of ProMoE, which renames the dense MLPs, is not supported")
    if moe["init_MoeMLP"]:
        raise UserError("init_MoeMLP of ProMoE fails in the authors' code; set it to false")
    if h["head_dim"] not in (None, h["hidden_size"] // h["num_heads"]):
        raise UserError(f"head_dim {h['head_dim']} is not hidden_size / num_heads: unsupported")
    if family == "promoe_ec":
        return
    if moe["load_balance_loss_coef"]:
        raise UserError("load_balance_loss_coef of ProMoE is not supported; set it to 0")
    first_only = not moe["use_top_k_for_routing_contrastive"] and moe["top_k"] > 1
    if moe["routing_contrastive_lam"] and first_only:
        raise UserError(
            "use_top_k_for_routing_contrastive=false with top_k > 1 is not supported; set it to "
            "true, or routing_contrastive_lam to 0 (neither changes what the network computes)"
        )


def _from_yaml(family: str, hparams: Mapping[str, Any]) -> Mapping[str, Any]:
    """The constructor's arguments from the authors' yaml file; returns other tables unchanged."""
    sections = [key for key in hparams if re.fullmatch(r"DiT_(S|B|L|XL)_config", key)]
    if len(sections) != 1:
        if "model_name" in hparams:  # one of the baselines that the authors compare with
            raise UserError(
                f"model_name is {shown(hparams['model_name'])}: no ProMoE, whose yaml files have "
                f"one section DiT_S_config, DiT_B_config, DiT_L_config or DiT_XL_config; {family} "
                "reads no other"
            )
        return hparams
    name = hparams.get("model_name", family)
    if f"_{family[-2:].upper()}_" not in f"{str(name)[:100].upper()}_":
        raise UserError(
            f"model_name is {shown(name)}: choose the family that it names, not {family}"
        )
    Key((dict,)).check(hparams[sections[0]], sections[0], "restore the authors' file")
    depth, hidden_size, num_heads = shapes.SIZES[sections[0].split("_")[1]]
    sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    others = {key: hparams[key] for key in _HPARAMS if key in hparams}
    return {**others, **sizes, **hparams[sections[0]]}


_TOLD = ("num_routed_experts", "moe_intermediate_size", "top_k", "router_weight_mode")
ASKED = (*shapes.TRUNK, *(f"MoE_config.{name}" for name in _TOLD))

FAMILIES = {
    name: Family(
        name,
        _ROWS,
        TABLE,
        partial(configure, name),
        from_shapes=shapes.promoe_from_shapes,
        asked=ASKED,
    )
    for name in ("promoe_tc", "promoe_ec")
}
