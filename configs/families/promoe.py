"""The published ProMoE models (arXiv 2510.24711)."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import settings
from moe_diffusion import config as configs

# Size -> depth, width, heads. From config.py and configs/004_ProMoE_*.yaml, which the authors
# released with arXiv 2510.24711.
_SIZES = {
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}


def promoe(size: str, arg: str | None) -> ConfigDict:
    """ProMoE for ImageNet 256x256 in latent space (arXiv 2510.24711).

    Args:
      size: "s" | "b" | "l" | "xl".
      arg: of the config file: routing=token_choice (all sizes were published) | expert_choice (L
        was); objective=flow (all were published) | ddpm, for which the authors recommend expert
        choice; setting= one of `settings.SETTINGS`.
    """
    choices = {"routing": ("token_choice", "expert_choice"), "objective": ("flow", "ddpm")}
    chosen = settings.parse(
        f"promoe_{size}", arg, choices=choices, routing="token_choice", objective="flow"
    )
    config = configs.default()
    config.name = f"promoe_{size}_{chosen.routing}_{chosen.objective}"

    model = config.model
    model.depth, model.hidden_size, model.num_heads = _SIZES[size]
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.num_classes = 1000
    model.learn_sigma = True  # as the checkpoints have it; the flow loss uses the first half
    model.dtype = "auto"
    model.residual_dtype = "float32"  # as under the authors' autocast: see docs/papers_vs_code.md

    # There are 14 experts of half a dense block's width: 12 with a prototype, one for samples
    # without a label, and a shared one. Two of them serve each token.
    model.moe.num_experts = 13
    model.moe.hidden_size = model.moe.shared_hidden_size = 2 * model.hidden_size
    model.moe.mlp = model.moe.shared_mlp = "gelu"
    model.moe.bias = model.moe.shared_bias = True
    model.router.name = {"token_choice": "promoe_tc", "expert_choice": "promoe_ec"}[chosen.routing]
    model.router.scores = "identity"
    model.router.top_k, model.router.capacity = 1, 1.0  # one of the two is a field of the router
    model.router.kernel_init = "normal_0.02"
    config.loss_weights.contrast = 1.0

    # AdamW(0.9, 0.999), constant 1e-4, no decay, EMA 0.9999 and label dropout 0.1 are the defaults.
    config.data.source = "latents:data/imagenet256_latents"
    config.data.augment = "flip"
    config.data.batch_size = 256
    config.optim.clip_norm = 0.5
    config.train.num_steps = 500_000
    config.checkpoint.keep_every = 50_000
    config.parallel.preset = "dp" if size in ("s", "b") else "fsdp"
    if chosen.objective == "ddpm":
        config.diffusion.path = "ddpm"
        config.sampling.update(sampler="ddpm", cfg_channels=3)
    else:
        model.time_scale, model.dit.reverse_time = 1000.0, True
        config.diffusion.time_sampling = "logit_normal"
        config.sampling.sampler = "euler"
    # The protocol of the published FIDs: 250 steps, guidance 1.0 and 1.5.
    config.sampling.steps, config.sampling.cfg = 250, 1.5
    settings.apply(config, chosen.setting)
    return config
