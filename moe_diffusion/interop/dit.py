"""Key maps of the DiT-like families: DiT, SiT, DSMoE, TC-DiT, EC-DiT, DiffMoE."""

from __future__ import annotations

from functools import partial

import numpy as np
from flax import linen as nn

from moe_diffusion.interop.hparams import configure
from moe_diffusion.interop.keymap import (
    CONV,
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    SAME,
    Constant,
    Family,
    Row,
)
from moe_diffusion.models import blocks


def _linear(torch: str, ours: str, layout=LINEAR, bias=SAME, **when) -> tuple[Row, ...]:
    """A linear layer; the bias row holds where our layer has one."""
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", layout, **when),
        Row(f"{torch}.bias", f"{ours}/bias", bias, **when),
    )


def _mlp(torch: str, ours: str) -> tuple[Row, ...]:
    """Two layers are called fc1, fc2; a gated MLP has gate_proj, up_proj, down_proj."""
    gate = f"{ours}/gate/kernel"
    return (
        *_linear(f"{torch}.fc1", f"{ours}/up", unless=gate),
        *_linear(f"{torch}.fc2", f"{ours}/down", unless=gate),
        *_linear(f"{torch}.gate_proj", f"{ours}/gate", needs=gate),
        *_linear(f"{torch}.up_proj", f"{ours}/up", needs=gate),
        *_linear(f"{torch}.down_proj", f"{ours}/down", needs=gate),
    )


def _experts(torch: str, ours: str) -> tuple[Row, ...]:
    """The same names for every expert {e}; our experts are stacked [layers, experts, ...]."""
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


_BLOCK = "params/{block}"
_MOE = "params/{block}/moe"
_STATE = "router_state/{block}/moe/router"

_TRUNK = (
    *_linear("x_embedder.proj", "params/patch_embed", CONV),
    *_linear("t_embedder.mlp.0", "params/time_embed/dense_0"),
    *_linear("t_embedder.mlp.2", "params/time_embed/dense_1"),
    Row("y_embedder.embedding_table.weight", "params/label_embed/embedding", SAME),
    *_linear("blocks.{i}.adaLN_modulation.1", f"{_BLOCK}/adaLN"),
    *_linear("blocks.{i}.attn.qkv", f"{_BLOCK}/attn/qkv", HEADS_OUT, FLAT),
    *_linear("blocks.{i}.attn.proj", f"{_BLOCK}/attn/proj", HEADS_IN),
    *_mlp("blocks.{i}.mlp", f"{_BLOCK}/mlp"),
    *_linear("final_layer.adaLN_modulation.1", "params/final/adaLN"),
    *_linear("final_layer.linear", "params/final/linear"),
)

_SHARED = _mlp("blocks.{i}.mlp.shared_experts", f"{_MOE}/shared")

_DSMOE = (
    Row("blocks.{i}.norm1.weight", f"{_BLOCK}/norm1/scale", SAME),
    Row("blocks.{i}.norm2.weight", f"{_BLOCK}/norm2/scale", SAME),
    # Grouped-query attention has three projections instead of one.
    *_linear("blocks.{i}.attn.q_proj", f"{_BLOCK}/attn/q", HEADS_OUT, FLAT),
    *_linear("blocks.{i}.attn.k_proj", f"{_BLOCK}/attn/k", HEADS_OUT, FLAT),
    *_linear("blocks.{i}.attn.v_proj", f"{_BLOCK}/attn/v", HEADS_OUT, FLAT),
    Row("blocks.{i}.mlp.gate.weight", f"{_MOE}/router/kernel", LINEAR),
    Row("blocks.{i}.mlp.gate.e_score_correction_bias", f"{_STATE}/bias", SAME),
    *_experts("blocks.{i}.mlp.experts.blocks.{e}", f"{_MOE}/experts"),
    *_SHARED,
)

_TCDIT = (
    Row("blocks.{i}.mlp.gate.weight", f"{_MOE}/router/kernel", LINEAR),
    *_experts("blocks.{i}.mlp.experts.{e}", f"{_MOE}/experts"),
    *_SHARED,
)

_ECDIT = (
    Row("blocks.{i}.mlp.gate_weight", f"{_MOE}/router/kernel", LINEAR),
    *_experts("blocks.{i}.mlp.experts.{e}", f"{_MOE}/experts"),
    *_SHARED,
)

_DIFFMOE = (
    *_ECDIT,
    *_linear("blocks.{i}.mlp.capacity_predictor.0", f"{_MOE}/router/predictor/dense_0"),
    *_linear("blocks.{i}.mlp.capacity_predictor.2", f"{_MOE}/router/predictor/dense_1"),
    Row("blocks.{i}.mlp.expert_threshold", f"{_STATE}/threshold", SAME),
)


def _pos_embed(model: nn.Module) -> np.ndarray | None:
    """The sin-cos table [1, S, D], a frozen parameter of the authors' models."""
    if model.positions != "sincos":
        return None
    return blocks.sincos_table(model.image_size // model.patch_size, model.hidden_size)[None]


def _ema_decay(model: nn.Module) -> np.ndarray:
    """The decay of DiffMoE's thresholds, a buffer of shape [1]."""
    return np.asarray([model.make_moe().make_router().threshold_decay], np.float32)


_TABLE = (Constant("pos_embed", _pos_embed),)
_DECAY = (Constant("blocks.{i}.mlp.ema_decay", _ema_decay),)

FAMILIES = {
    name: Family(name, rows, constants, partial(configure, name))
    for name, rows, constants in (
        ("dit", _TRUNK, _TABLE),
        ("sit", _TRUNK, _TABLE),
        ("dsmoe", _TRUNK + _DSMOE, _TABLE),
        ("tcdit", _TRUNK + _TCDIT, _TABLE),
        ("ecdit", _TRUNK + _ECDIT, _TABLE),
        ("diffmoe", _TRUNK + _DIFFMOE, _TABLE + _DECAY),
    )
}
