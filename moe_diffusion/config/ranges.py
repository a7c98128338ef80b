"""Which values each shared key of a config may have; `validation` checks combinations of keys."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion.checks import check_seed, check_values

_MLPS = ("gelu", "silu", "swiglu")

CHOICES = {
    "model.mlp": _MLPS,
    "model.norm": ("layernorm", "rmsnorm"),
    "model.qk_norm_kind": ("rmsnorm", "layernorm_affine"),
    "model.positions": ("sincos", "rope1d", "rope2d", "rope2d_pairs"),
    "model.param_dtype": ("float32", "bfloat16", "float16"),
    "model.dtype": ("float32", "bfloat16", "auto"),
    "model.residual_dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "cheap", "dots", "full"),
    "model.attention": ("auto", "xla", "own_gradient", "splash", "cudnn"),
    "model.moe.mlp": _MLPS,
    "model.moe.shared_mlp": _MLPS,
    "model.moe.backend": (
        *("auto", "reference", "blocked", "slots", "cpu", "tpu", "gpu", "ragged_dot"),
    ),
    "model.moe.transport": ("auto", "none", "gather", "a2a_slots", "ragged_a2a"),
    "model.router.group": ("sample", "shard", "batch"),
    "diffusion.path": ("flow", "ddpm"),
    "diffusion.prediction": ("velocity", "data"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "sampling.sampler": ("heun", "euler", "dopri5", "sde", "sde_heun", "ddpm", "ddim"),
    "sampling.time_shift": ("none", "resolution"),
    "sampling.sde_diffusion": ("sigma", "constant", "decreasing", "increasing_decreasing"),
    "sampling.sde_last_step": ("mean", "euler"),
    "data.augment": ("none", "flip", "dequantize"),
    "optim.schedule": ("constant", "cosine", "linear", "inverse_sqrt"),
    "optim.mu_dtype": ("float32", "bfloat16"),
    "optim.decay_mask": ("all", "matrices"),
    "optim.accumulate_reduce": ("mean", "sum"),
    "ema.router_state": ("average", "copy", "live"),
    "distill.teacher_dtype": ("auto", "float32", "bfloat16"),
    "distill.importance": ("taylor", "random"),
    "distill.adaln_init": ("svd", "random"),
    "distill.adaln_stage": ("shared", "experts", "both", "none"),
    "parallel.preset": ("dp", "zero1", "fsdp", "fsdp_ep", "tp"),
}

_POSITIVE = (
    *(f"model.{k}" for k in ("image_size", "channels", "patch_size", "hidden_size", "depth")),
    *(f"model.{k}" for k in ("num_heads", "mlp_ratio", "num_classes", "time_scale")),
    "model.qk_norm_eps",
    *(f"model.moe.{k}" for k in ("hidden_size", "capacity_factor")),
    *(f"diffusion.{k}" for k in ("time_std", "t_eps", "noise_scale")),
    *(f"sampling.{k}" for k in ("steps", "rtol", "atol", "sde_norm", "sde_last_step_size")),
    *("data.batch_size", "optim.learning_rate", "distill.importance_batches"),
    *(f"distill.{k}.learning_rate" for k in ("shared", "experts", "groups")),
    *("optim.eps", "optim.accumulate", "train.num_steps", "train.log_every", "train.samples"),
    *("checkpoint.every", "checkpoint.keep_last"),
)

_NOT_NEGATIVE = (
    *("model.image_width", "model.unroll", "model.adaln_rank", "model.moe.num_experts"),
    *("model.num_kv_heads", "model.moe.shared_hidden_size", "model.moe.skip_first"),
    *("sampling.cfg", "sampling.cfg_channels", "sampling.pool", "distill.feature_weight"),
    *(f"distill.{k}.steps" for k in ("shared", "experts", "groups")),
    *("parallel.expert", "data.num_workers", "data.prefetch", "optim.warmup_steps"),
    *("parallel.tensor", "optim.weight_decay", "optim.min_learning_rate", "diffusion.time_shift"),
    *("optim.clip_norm", "train.sample_every", "train.eval_samples", "checkpoint.keep_every"),
)

_FRACTION = ("model.moe.dropout", "optim.b1", "optim.b2")  # in [0, 1)
_SHARE = ("diffusion.cond_dropout", "sampling.eta", "sampling.sde_last_step_size")  # in [0, 1]

# No machine holds more; a slip of the keyboard is told at once, before anything is allocated.
_MOST = {
    **{f"model.{key}": 1 << 14 for key in ("image_size", "image_width", "channels", "patch_size")},
    "model.hidden_size": 1 << 17,
    "model.depth": 1 << 12,
    "model.unroll": 1 << 12,
    "model.mlp_ratio": 1 << 10,
    "model.num_classes": 1 << 24,
    "model.moe.num_experts": 1 << 14,
    "model.moe.hidden_size": 1 << 20,
    "model.moe.shared_hidden_size": 1 << 20,
    "sampling.steps": 1 << 20,
    "data.batch_size": 1 << 24,
    "data.prefetch": 1 << 12,
}


def check_ranges(config: ConfigDict) -> None:
    """Checks every shared value on its own. Architectures and routers check their own fields."""
    check_values(
        config,
        choices=CHOICES,
        positive=_POSITIVE,
        not_negative=_NOT_NEGATIVE,
        fraction=_FRACTION,
        share=_SHARE,
        most=_MOST,
    )
    check_seed("seed", config.seed)
