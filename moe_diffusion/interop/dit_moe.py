"""DiT-MoE (2407.11633): key map and hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_diffusion.interop import shapes
from moe_diffusion.interop.dit import BLOCK, MOE, TABLE, TRUNK, experts, linear, mlp
from moe_diffusion.interop.hparams import UNUSED, fill
from moe_diffusion.interop.rows import FLAT, HEADS_IN, HEADS_OUT, LINEAR, SAME, Family, Row

# Size -> depth, width, heads.
SIZES = {**shapes.SIZES, "G": (40, 1408, 16)}

_ATTN = f"{BLOCK}/attn"
_NORMED = f"{_ATTN}/q_norm/scale"  # only models that were trained with flash attention have it

_ROWS = (
    *(row for row in TRUNK if ".attn." not in row.torch),
    *linear("blocks.{i}.attn.qkv", f"{_ATTN}/qkv", HEADS_OUT, FLAT, unless=_NORMED),
    *linear("blocks.{i}.attn.proj", f"{_ATTN}/proj", HEADS_IN, unless=_NORMED),
    *linear("blocks.{i}.attn.Wqkv", f"{_ATTN}/qkv", HEADS_OUT, FLAT, needs=_NORMED),
    *linear("blocks.{i}.attn.out_proj", f"{_ATTN}/proj", HEADS_IN, needs=_NORMED),
    Row("blocks.{i}.attn.q_norm.weight", f"{_ATTN}/q_norm/scale", SAME),
    Row("blocks.{i}.attn.q_norm.bias", f"{_ATTN}/q_norm/bias", SAME),
    Row("blocks.{i}.attn.k_norm.weight", f"{_ATTN}/k_norm/scale", SAME),
    Row("blocks.{i}.attn.k_norm.bias", f"{_ATTN}/k_norm/bias", SAME),
    Row("blocks.{i}.moe.gate.weight", f"{MOE}/router/kernel", LINEAR),
    *experts("blocks.{i}.moe.experts.{e}", f"{MOE}/experts"),
    *mlp("blocks.{i}.moe.shared_experts", f"{MOE}/shared"),
)

_HPARAMS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pretraining_tp": UNUSED,
    "learn_sigma": True,
    "use_flash_attn": False,
    "rf": True,
}


def configure(hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Sets `config` to a DiT-MoE and its training.

    Args:
      hparams: arguments of the authors' constructor, and `rf`: whether the model is a rectified
        flow (the default) or a DDPM. No weight shows `rf`.
    """
    h = fill("model", _HPARAMS, hparams)
    model = config.model
    model.image_size, model.channels = h["input_size"], h["in_channels"]
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes", "learn_sigma"):
        model[name] = h[name]
    model.qk_norm, model.qk_norm_kind = bool(h["use_flash_attn"]), "layernorm_affine"
    model.moe.update(
        num_experts=h["num_experts"],
        hidden_size=int(h["mlp_ratio"] * h["hidden_size"]),
        mlp="swiglu",
        bias=False,
        shared_hidden_size=2 * h["hidden_size"],  # two shared experts in one
        shared_mlp="swiglu",
        shared_bias=False,
        interleave=False,
    )
    model.router.update(
        name="token_choice",
        top_k=h["num_experts_per_tok"],
        scores="softmax",
        normalize=False,
        kernel_init="kaiming_uniform",
    )
    config.loss_weights.balance = 0.01
    config.diffusion.cond_dropout = float(h["class_dropout_prob"])
    if h["rf"]:
        model.dit.reverse_time = True
        config.diffusion.time_sampling = "logit_normal"
        config.sampling.update(sampler="euler", steps=50, cfg=1.5)
    else:
        config.diffusion.path = "ddpm"
        config.sampling.update(sampler="ddpm", steps=250, cfg=1.5, cfg_channels=3, joint=True)


def _from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hyperparameters from the arguments of the authors' train.py; None if of another program."""
    match = re.fullmatch(r"DiT-(S|B|L|XL|G)/(\d{1,4})", str(args.get("model")))
    if not match or "num_experts" not in args:
        return None
    depth, hidden_size, num_heads = SIZES[match[1]]
    known = ("num_classes", "num_experts", "num_experts_per_tok", "rf")
    return {
        "input_size": shapes.input_size_of(args),
        "patch_size": int(match[2]),
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        **{name: args[name] for name in known if name in args},
    }


ASKED = (*shapes.TRUNK, "num_experts", "num_experts_per_tok", "rf")

FAMILIES = {
    "dit_moe": Family(
        "dit_moe", _ROWS, TABLE, configure, _from_args, shapes.dit_moe_from_shapes, ASKED
    )
}
