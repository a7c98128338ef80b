"""What each key of a config may be on its own; `validation` says what goes together."""

from __future__ import annotations

from operator import attrgetter

from ml_collections import ConfigDict

from moe_diffusion.errors import UserError

_MLPS = ("gelu", "silu", "swiglu")

CHOICES = {
    "model.family": ("dit", "jit"),
    "model.mlp": _MLPS,
    "model.norm": ("layernorm", "rmsnorm"),
    "model.qk_norm_kind": ("rmsnorm", "layernorm_affine"),
    "model.positions": ("sincos", "rope1d", "rope2d", "rope2d_pairs"),
    "model.dtype": ("float32", "bfloat16", "auto"),
    "model.remat": ("none", "cheap", "dots", "full"),
    "model.attention": ("auto", "xla", "own_gradient", "splash", "cudnn"),
    "model.moe.mlp": _MLPS,
    "model.moe.shared_mlp": _MLPS,
    "model.moe.backend": (
        *("auto", "reference", "blocked", "slots", "cpu", "tpu", "gpu", "ragged_dot"),
    ),
    "model.moe.transport": ("auto", "none", "gather", "a2a_slots", "ragged_a2a"),
    "model.router.name": (
        *("token_choice", "expert_choice", "diffmoe", "promoe_tc", "promoe_ec", "dense"),
    ),
    "model.router.scores": ("softmax", "sigmoid", "identity"),
    "model.router.scope": ("sample", "shard", "batch"),
    "model.router.kernel_init": (
        *("kaiming_normal", "kaiming_uniform", "normal_0.006", "normal_0.02"),
    ),
    "diffusion.path": ("flow", "ddpm"),
    "diffusion.prediction": ("velocity", "data"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "sampling.sampler": ("heun", "euler", "dopri5", "sde", "sde_heun", "ddpm", "ddim"),
    "sampling.sde_diffusion": ("sigma", "constant", "decreasing", "increasing_decreasing"),
    "sampling.sde_last_step": ("mean", "euler"),
    "data.augment": ("none", "flip", "dequantize"),
    "optim.schedule": ("constant", "cosine"),
    "optim.mu_dtype": ("float32", "bfloat16"),
    "optim.decay_mask": ("all", "matrices"),
    "optim.accumulate_reduce": ("mean", "sum"),
    "ema.router_state": ("average", "copy", "live"),
    "parallel.preset": ("dp", "zero1", "fsdp", "fsdp_ep"),
}

_POSITIVE = (
    *(f"model.{k}" for k in ("image_size", "channels", "patch_size", "hidden_size", "depth")),
    *(f"model.{k}" for k in ("num_heads", "mlp_ratio", "num_classes", "time_scale", "bottleneck")),
    "model.qk_norm_eps",
    *(f"model.moe.{k}" for k in ("num_experts", "hidden_size", "capacity_factor")),
    *(f"model.router.{k}" for k in ("top_k", "scale", "n_group", "topk_group", "capacity")),
    "model.router.contrast_temperature",
    *(f"diffusion.{k}" for k in ("time_std", "t_eps", "noise_scale", "time_shift")),
    *(f"sampling.{k}" for k in ("steps", "rtol", "atol", "sde_norm", "sde_last_step_size")),
    *("data.batch_size", "optim.learning_rate"),
    *("optim.eps", "optim.accumulate", "train.num_steps", "train.log_every", "train.samples"),
    *("checkpoint.every", "checkpoint.keep_last"),
)

_NOT_NEGATIVE = (
    *("model.unroll", "model.in_context_tokens", "model.in_context_start"),
    *("seed", "model.num_kv_heads", "model.moe.shared_hidden_size", "model.moe.skip_first"),
    *("model.router.bias_update_rate", "model.router.max_capacity", "sampling.cfg"),
    "sampling.cfg_channels",
    *("parallel.expert", "data.num_workers", "data.prefetch", "optim.warmup_steps"),
    "optim.weight_decay",
    *("optim.clip_norm", "train.sample_every", "train.eval_samples", "checkpoint.keep_every"),
)

_FRACTION = (  # in [0, 1)
    *("model.dropout", "model.moe.dropout", "model.router.threshold_decay"),
    *("optim.b1", "optim.b2"),
)
_SHARE = ("diffusion.label_dropout", "sampling.eta", "sampling.sde_last_step_size")  # in [0, 1]

# The auxiliary losses that each router can return.
LOSSES = {
    "token_choice": ("balance", "router_z"),
    "expert_choice": ("router_z",),
    "diffmoe": ("capacity", "router_z"),
    "promoe_tc": ("contrast",),
    "promoe_ec": ("contrast",),
    "dense": (),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_ranges(config: ConfigDict) -> None:
    """Every value on its own."""
    for key, allowed in CHOICES.items():
        value = attrgetter(key)(config)
        require(value in allowed, f"{key} = {value!r} is unknown; choose {' | '.join(allowed)}")
    for keys, condition, wanted in (
        (_POSITIVE, lambda value: value > 0, "positive"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "zero or positive"),
        (_FRACTION, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (_SHARE, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for key in keys:
            value = attrgetter(key)(config)
            require(condition(value), f"{key} = {value} must be {wanted}")
