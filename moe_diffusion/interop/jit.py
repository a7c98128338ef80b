"""Key maps and hyperparameters of JiT and JiTMoE.

Their checkpoints hold the `Denoiser` around the network, so every name begins with "net.".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_collections
import numpy as np
from flax import linen as nn

from moe_diffusion.errors import UserError, shown
from moe_diffusion.interop import shapes
from moe_diffusion.interop.dit import linear
from moe_diffusion.interop.hparams import MAYBE_TABLE, SIZE, UNUSED, fill, without_default
from moe_diffusion.interop.rows import (
    CONV_1X1,
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LEADING_1,
    LINEAR,
    PATCHES,
    SAME,
    Constant,
    Family,
    Row,
)
from moe_diffusion.models import blocks
from moe_diffusion.reading import Key

# --- names ---------------------------------------------------------------------------------------


def _linear(torch: str, ours: str, *layouts, **options) -> tuple[Row, ...]:
    return linear(f"net.{torch}", f"params/{ours}", *layouts, **options)


def _swiglu(torch: str, ours: str) -> tuple[Row, ...]:
    return (
        # w12 joins gate and up: silu(the first half) is multiplied by the second half.
        *_linear(f"{torch}.w12", f"{ours}/gate", along=0),
        *_linear(f"{torch}.w12", f"{ours}/up", along=0),
        *_linear(f"{torch}.w3", f"{ours}/down"),
    )


def _experts(torch: str, ours: str) -> tuple[Row, ...]:
    """Our experts are stacked: [layers, experts, ...]."""
    rows = (("w12", "gate", 0), ("w12", "up", 0), ("w3", "down", None))
    return tuple(
        row
        for name, our_name, along in rows
        for row in (
            Row(f"net.{torch}.{name}.weight", f"params/{ours}/{our_name}", LINEAR, along=along),
            Row(f"net.{torch}.{name}.bias", f"params/{ours}/{our_name}_bias", SAME, along=along),
        )
    )


def _scale(torch: str, ours: str) -> Row:
    return Row(f"net.{torch}.weight", f"params/{ours}/scale", SAME)


_TRUNK = (
    *_linear("x_embedder.proj1", "patch_embed/reduce", PATCHES),
    *_linear("x_embedder.proj2", "patch_embed/expand", CONV_1X1),
    *_linear("t_embedder.mlp.0", "time_embed/dense_0"),
    *_linear("t_embedder.mlp.2", "time_embed/dense_1"),
    Row("net.y_embedder.embedding_table.weight", "params/label_embed/embedding", SAME),
    Row("net.in_context_posemb", "params/in_context_embed", LEADING_1),
    _scale("blocks.{i}.norm1", "{block}/norm1"),
    *_linear("blocks.{i}.attn.qkv", "{block}/attn/qkv", HEADS_OUT, FLAT),
    _scale("blocks.{i}.attn.q_norm", "{block}/attn/q_norm"),
    _scale("blocks.{i}.attn.k_norm", "{block}/attn/k_norm"),
    *_linear("blocks.{i}.attn.proj", "{block}/attn/proj", HEADS_IN),
    _scale("blocks.{i}.norm2", "{block}/norm2"),
    *_swiglu("blocks.{i}.mlp", "{block}/mlp"),
    *_linear("blocks.{i}.adaLN_modulation.1", "{block}/adaLN"),
    _scale("final_layer.norm_final", "final/norm"),
    *_linear("final_layer.linear", "final/linear"),
    *_linear("final_layer.adaLN_modulation.1", "final/adaLN"),
)

_MOE = (
    Row("net.blocks.{i}.mlp.gate.weight", "params/{block}/moe/router/kernel", LINEAR),
    Row(
        "net.blocks.{i}.mlp.gate.e_score_correction_bias",
        "router_state/{block}/moe/router/bias",
        SAME,
    ),
    *_experts("blocks.{i}.mlp.experts.blocks.{e}", "{block}/moe/experts"),
    *_swiglu("blocks.{i}.mlp.shared_experts", "{block}/moe/shared"),
)


def _pos_embed(model: nn.Module) -> np.ndarray:
    """The sin-cos table [1, S, D], a frozen parameter of the authors' model."""
    return blocks.sincos_table(model.grid, model.hidden_size)[None]


# --- hyperparameters -----------------------------------------------------------------------------

# The constructor of JiT, JiTMoE/model_jit.py.
_NET = {
    "input_size": 256,
    "patch_size": 16,
    "in_channels": 3,
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "num_classes": 1000,
    "bottleneck_dim": 128,
    "in_context_len": 32,
    "in_context_start": 8,
    "moe_config": MAYBE_TABLE,
}
_MOE_CONFIG = {
    "num_experts": SIZE,
    "hidden_size": UNUSED,  # the code takes the model's
    "moe_intermediate_size": SIZE,
    "n_group": SIZE,
    "topk_group": SIZE,
    "num_experts_per_tok": SIZE,
    "routed_scaling_factor": Key((float,)),
    "interleave": Key((bool,)),
    "use_shared_expert": Key((bool,)),
    "proj_drop": 0.0,
}
# What the Denoiser reads of the command line of main_jit.py, with its defaults.
_DENOISER = {
    "P_mean": -0.8,
    "P_std": 0.8,
    "t_eps": 0.05,
    "noise_scale": 1.0,
    "label_drop_prob": 0.1,
    "sampling_method": "heun",
    "num_sampling_steps": 50,
    "cfg": 1.0,
    "interval_min": 0.0,
    "interval_max": 1.0,
}
# Name on the command line -> default, and the constructor's name, of arguments of the network.
_ARGS = {
    "img_size": (256, "input_size"),
    "class_num": (1000, "num_classes"),
    "attn_dropout": (0.0, "attn_drop"),
    "proj_dropout": (0.0, "proj_drop"),
}

# size -> depth, width, heads, bottleneck, first block with class tokens (2511.13720, Table 9).
SIZES = {
    "B": (12, 768, 12, 128, 4),
    "L": (24, 1024, 16, 128, 8),
    "H": (32, 1280, 16, 256, 10),
    "G": (40, 1664, 16, 256, 10),
}
# JiTMoE with 16 experts (model_jit.py): size -> depth, width of an expert, dropout of an expert.
# The rest is as above.
MOE_SIZES = {"B": (10, 1536, 0.0), "L": (20, 2048, 0.0), "H": (28, 2048, 0.2)}


def net_of(name: str) -> dict[str, Any]:
    """Constructor arguments of a model by the authors' name: "JiT-B/16", "JiT-L/16-E16", ...

    Raises:
      UserError: no such model.
    """
    match = re.fullmatch(r"JiT-([BLHG])/(16|32)(-E16)?", name)
    if not match or (match[3] and (match[1] not in MOE_SIZES or match[2] != "16")):
        raise UserError(
            f"unknown model {shown(name)}; known are JiT-{{B,L,H,G}}/{{16,32}} and -E16"
        )
    size, patch, experts = match.groups()
    depth, width, heads, bottleneck, start = SIZES[size]
    net = {"num_heads": heads, "bottleneck_dim": bottleneck, "in_context_start": start}
    net |= {"depth": depth, "hidden_size": width, "patch_size": int(patch), "in_context_len": 32}
    if experts:
        net["depth"], expert_width, dropout = MOE_SIZES[size]
        net["moe_config"] = {
            "num_experts": 16,
            "moe_intermediate_size": expert_width,
            "n_group": 2,
            "topk_group": 2,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5,
            "interleave": True,
            "use_shared_expert": True,
            "proj_drop": dropout,
        }
    return net


def from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hyperparameters from the arguments of main_jit.py; None if `args` is of another program.

    Arguments that concern neither the network nor the sampling are ignored.
    """
    if not str(args.get("model"))[:100].startswith("JiT-"):
        return None
    net = net_of(args["model"])
    net |= {theirs: args.get(name, default) for name, (default, theirs) in _ARGS.items()}
    denoiser = {name: args.get(name, default) for name, default in _DENOISER.items()}
    return {"net": net, "denoiser": denoiser}


def configure(family: str, hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Sets `config` (model, diffusion, sampling) to a network of the family jit | jitmoe.

    Args:
      hparams: {"net": arguments of the network's constructor, "denoiser": those of the Denoiser},
        or arguments that `from_args` reads. Those left out take the authors' default.

    Raises:
      UserError: a key or the model is unknown, a value is of the wrong kind, or an option has no
        counterpart here.
    """
    known = {"net": Key((dict,)), "denoiser": {}}
    hparams = fill("hyperparameters", known, from_args(hparams) or hparams)
    net = fill("net", _NET, hparams["net"])
    _set_net(config.model, net)
    moe = fill("moe_config", _MOE_CONFIG, net["moe_config"]) if net["moe_config"] else None
    # With `interleave: false` the authors' code makes no block with experts at all.
    if bool(moe and moe["interleave"]) != (family == "jitmoe"):
        other = "jit" if family == "jitmoe" else "jitmoe"
        raise UserError(f"these hyperparameters are of the family {other}, not {family}")
    if family == "jitmoe":
        _set_moe(config.model, moe)
    else:
        config.model.router.name = "dense"
    _set_denoiser(config, fill("denoiser", _DENOISER, hparams["denoiser"]))


def _set_net(model: ml_collections.ConfigDict, net: Mapping[str, Any]) -> None:
    if net["attn_drop"]:
        raise UserError("attn_drop (dropout of attention weights) is not supported; none has it")
    model.update(
        architecture="jit",
        image_size=net["input_size"],
        channels=net["in_channels"],
        mlp_ratio=float(net["mlp_ratio"]),
        mlp="swiglu",
        norm="rmsnorm",
        qk_norm=True,
        positions="rope2d_pairs",
        # Under the authors' autocast the class tokens, in float32, make the stream so.
        residual_dtype="float32" if net["in_context_len"] else "auto",
    )
    model.jit.update(
        bottleneck=net["bottleneck_dim"],
        in_context_tokens=net["in_context_len"],
        in_context_start=net["in_context_start"],
        dropout=float(net["proj_drop"]),
    )
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes"):
        model[name] = net[name]


def _set_moe(model: ml_collections.ConfigDict, moe: Mapping[str, Any]) -> None:
    """Sets the router and the layer of DSMoE, but with biases in the experts."""
    shared = moe["use_shared_expert"]
    model.moe.update(
        num_experts=moe["num_experts"],
        hidden_size=moe["moe_intermediate_size"],
        mlp="swiglu",
        bias=True,
        shared_hidden_size=moe["moe_intermediate_size"] if shared else 0,
        shared_mlp="swiglu",
        shared_bias=True,
        residual_input=not shared,
        dropout=float(moe["proj_drop"]),
    )
    model.router.update(
        name="token_choice",
        top_k=moe["num_experts_per_tok"],
        scores="sigmoid",
        normalize=True,
        scale=float(moe["routed_scaling_factor"]),
        selection_bias=True,
        n_group=moe["n_group"],
        topk_group=moe["topk_group"],
    )


def _set_denoiser(config: ml_collections.ConfigDict, denoiser: Mapping[str, Any]) -> None:
    config.diffusion.update(
        prediction="data",
        t_eps=float(denoiser["t_eps"]),
        noise_scale=float(denoiser["noise_scale"]),
        time_sampling="logit_normal",
        time_mean=float(denoiser["P_mean"]),
        time_std=float(denoiser["P_std"]),
        cond_dropout=float(denoiser["label_drop_prob"]),
    )
    config.sampling.update(
        sampler=denoiser["sampling_method"],
        steps=denoiser["num_sampling_steps"],
        final_euler=denoiser["sampling_method"] == "heun",
        cfg=float(denoiser["cfg"]),
        cfg_interval=(float(denoiser["interval_min"]), float(denoiser["interval_max"])),
    )


# If shapes do not show one of these, the user is asked for it: where class tokens begin, how a
# token chooses experts, how strong the noise is (2 for 512 pixels).
_DEFAULTED = ("mlp_ratio", "attn_drop", "proj_drop", "moe_config")
_ASKED = (*(f"net.{name}" for name in _NET if name not in _DEFAULTED), "denoiser.noise_scale")
_ASKED_MOE = tuple(f"net.moe_config.{name}" for name in without_default(_MOE_CONFIG))

FAMILIES = {
    name: Family(
        name,
        rows,
        (Constant("net.pos_embed", _pos_embed),),
        partial(configure, name),
        from_args,
        shapes.jit_from_shapes,
        asked,
    )
    for name, rows, asked in (
        ("jit", _TRUNK, _ASKED),
        ("jitmoe", _TRUNK + _MOE, _ASKED + _ASKED_MOE),
    )
}
