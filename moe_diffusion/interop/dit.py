"""Key maps of the DiT-like families: DiT, SiT, DSMoE, TC-DiT, EC-DiT, DiffMoE."""

from __future__ import annotations

from functools import partial

import numpy as np
from flax import linen as nn

from moe_diffusion.interop import shapes
from moe_diffusion.interop.hparams import configure
from moe_diffusion.interop.rows import (
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    PATCHES,
    SAME,
    Constant,
    Family,
    Row,
)
from moe_diffusion.models import blocks


def linear(torch: str, ours: str, layout=LINEAR, bias=SAME, **when) -> tuple[Row, ...]:
    """The rows of a linear layer; that of the bias applies only if our layer has a bias."""
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", layout, **when),
        Row(f"{torch}.bias", f"{ours}/bias", bias, **when),
    )


def mlp(torch: str, ours: str) -> tuple[Row, ...]:
    """The rows of an MLP: fc1 and fc2, or with a gate gate_proj, up_proj and down_proj."""
    gate = f"{ours}/gate/kernel"
    return (
        *linear(f"{torch}.fc1", f"{ours}/up", unless=gate),
        *linear(f"{torch}.fc2", f"{ours}/down", unless=gate),
        *linear(f"{torch}.gate_proj", f"{ours}/gate", needs=gate),
        *linear(f"{torch}.up_proj", f"{ours}/up", needs=gate),
        *linear(f"{torch}.down_proj", f"{ours}/down", needs=gate),
    )


def experts(torch: str, ours: str) -> tuple[Row, ...]:
    """The rows of all experts {e}; ours are stacked as [layers, experts, ...]."""
    gate = f"{ours}/gate"
    return (
        Row(f"{torch}.fc1.weight", f"{ours}/up", LINEAR, unless=gate),
        Row(f"{torch}.fc1.bias", f"{ours}/up_bias", SAME, unless=gate),
        Row(f"{torch}.fc2.weight", f"{ours}/down", LINEAR, unless=gate),
        Row(f"{torch}.fc2.bias", f"{ours}/down_bias", SAME, unless=gate),
        Row(f"{torch}.gate_proj.weight", f"{ours}/gate", LINEAR, needs=gate),
        Row(f"{torch}.up_proj.weight", f"{ours}/up", LINEAR, needs=gate),
        Row(f"{torch}.down_proj.weight", f"{ours}/down", LINEAR, needs=gate),
    )


BLOCK = "params/{block}"
MOE = "params/{block}/moe"
_STATE = "router_state/{block}/moe/router"

TRUNK = (
    *linear("x_embedder.proj", "params/patch_embed", PATCHES),
    *linear("t_embedder.mlp.0", "params/time_embed/dense_0"),
    *linear("t_embedder.mlp.2", "params/time_embed/dense_1"),
    Row("y_embedder.embedding_table.weight", "params/label_embed/embedding", SAME),
    *linear("blocks.{i}.adaLN_modulation.1", f"{BLOCK}/adaLN"),
    *linear("blocks.{i}.attn.qkv", f"{BLOCK}/attn/qkv", HEADS_OUT, FLAT),
    *linear("blocks.{i}.attn.proj", f"{BLOCK}/attn/proj", HEADS_IN),
    *mlp("blocks.{i}.mlp", f"{BLOCK}/mlp"),
    *linear("final_layer.adaLN_modulation.1", "params/final/adaLN"),
    *linear("final_layer.linear", "params/final/linear"),
)

_SHARED = mlp("blocks.{i}.mlp.shared_experts", f"{MOE}/shared")

_DSMOE = (
    Row("blocks.{i}.norm1.weight", f"{BLOCK}/norm1/scale", SAME),
    Row("blocks.{i}.norm2.weight", f"{BLOCK}/norm2/scale", SAME),
    # Grouped-query attention has three projections instead of one.
    *linear("blocks.{i}.attn.q_proj", f"{BLOCK}/attn/q", HEADS_OUT, FLAT),
    *linear("blocks.{i}.attn.k_proj", f"{BLOCK}/attn/k", HEADS_OUT, FLAT),
    *linear("blocks.{i}.attn.v_proj", f"{BLOCK}/attn/v", HEADS_OUT, FLAT),
    Row("blocks.{i}.mlp.gate.weight", f"{MOE}/router/kernel", LINEAR),
    Row("blocks.{i}.mlp.gate.e_score_correction_bias", f"{_STATE}/bias", SAME),
    *experts("blocks.{i}.mlp.experts.blocks.{e}", f"{MOE}/experts"),
    *_SHARED,
)

_TCDIT = (
    Row("blocks.{i}.mlp.gate.weight", f"{MOE}/router/kernel", LINEAR),
    *experts("blocks.{i}.mlp.experts.{e}", f"{MOE}/experts"),
    *_SHARED,
)

_ECDIT = (
    Row("blocks.{i}.mlp.gate_weight", f"{MOE}/router/kernel", LINEAR),
    *experts("blocks.{i}.mlp.experts.{e}", f"{MOE}/experts"),
    *_SHARED,
)

_DIFFMOE = (
    *_ECDIT,
    *linear("blocks.{i}.mlp.capacity_predictor.0", f"{MOE}/router/predictor/dense_0"),
    *linear("blocks.{i}.mlp.capacity_predictor.2", f"{MOE}/router/predictor/dense_1"),
    Row("blocks.{i}.mlp.expert_threshold", f"{_STATE}/threshold", SAME),
)


def _pos_embed(model: nn.Module) -> np.ndarray | None:
    """The sin-cos table [1, S, D], a frozen parameter of the authors' models."""
    if model.positions != "sincos":
        return None
    return blocks.sincos_table(model.grid, model.hidden_size)[None]


def _ema_decay(model: nn.Module) -> np.ndarray:
    """The decay of DiffMoE's thresholds, a buffer of shape [1]."""
    router = next(iter(model.routers().values()))
    return np.asarray([router.threshold_decay], np.float32)


TABLE = (Constant("pos_embed", _pos_embed),)
_DECAY = (Constant("blocks.{i}.mlp.ema_decay", _ema_decay),)


def _asked(*moe: str) -> tuple[str, ...]:
    return (*shapes.TRUNK, *(f"MoE_config.{name}" for name in ("num_experts", *moe)))


# How a checkpoint shows its hyperparameters, and which of them it must show.
_DENSE = {
    "from_args": shapes.dense_from_args,
    "from_shapes": shapes.dense_from_shapes,
    "asked": shapes.TRUNK,
}
_EXPERTS = {"from_shapes": shapes.moe_from_shapes, "asked": _asked("capacity")}
_DEEPSEEK = {
    "from_shapes": shapes.dsmoe_from_shapes,
    "asked": (
        *("rope_type", *_asked("moe_intermediate_size", "num_experts_per_tok")),
        *(f"MoE_config.{name}" for name in ("n_group", "topk_group", "routed_scaling_factor")),
    ),
}

FAMILIES = {
    name: Family(name, rows, constants, partial(configure, name), **told)
    for name, rows, constants, told in (
        ("dit", TRUNK, TABLE, _DENSE),
        ("sit", TRUNK, TABLE, _DENSE),
        ("dsmoe", TRUNK + _DSMOE, TABLE, _DEEPSEEK),
        ("tcdit", TRUNK + _TCDIT, TABLE, _EXPERTS),
        ("ecdit", TRUNK + _ECDIT, TABLE, _EXPERTS),
        ("diffmoe", TRUNK + _DIFFMOE, TABLE + _DECAY, _EXPERTS),
    )
}
