"""The published DiT-MoE models (arXiv 2407.11633)."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion import config as configs

# Size -> depth, width, heads. From models.py of the authors' repository.
_SIZES = {
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "xl": (28, 1152, 16),
    "g": (40, 1408, 16),
}


def dit_moe(size: str, experts: int, objective: str, qk_norm: bool = False) -> ConfigDict:
    """DiT-MoE for ImageNet 256x256 in latent space (arXiv 2407.11633), 2 experts per token.

    Args:
      size: "s" | "b" | "xl" | "g".
      experts: 8 (published for s, b and xl), or 16 (for s and g).
      objective: "ddpm" (published for s and b), or "flow" (for xl and g).
      qk_norm: LayerNorm of queries and keys. The authors' flash attention, with which xl and g were
        trained, has it; their plain attention does not.
    """
    config = configs.default()
    config.name = f"dit_moe_{size}_{experts}e2a_{objective}"

    model = config.model
    model.depth, model.hidden_size, model.num_heads = _SIZES[size]
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.num_classes = 1000
    model.learn_sigma = True
    model.dtype = "auto"
    model.qk_norm, model.qk_norm_kind = qk_norm, "layernorm_affine"

    model.moe.interleave = False
    model.moe.num_experts = experts
    model.moe.hidden_size = 4 * model.hidden_size
    model.moe.shared_hidden_size = 2 * model.hidden_size  # two shared experts, joined to one
    model.router.top_k = 2
    model.router.kernel_init = "kaiming_uniform"
    config.loss_weights.balance = 0.01

    # AdamW(0.9, 0.999), constant 1e-4, no decay, no clipping, EMA 0.9999 and label dropout 0.1 are
    # the defaults. The batch size is from the commands in the authors' README, which has none for
    # xl and g.
    config.data.source = "latents:data/imagenet256_latents"
    config.data.augment = "flip"
    config.data.batch_size = 256 if size == "s" else 1024
    config.checkpoint.keep_every = 50_000
    config.parallel.preset = "dp" if size == "s" else "fsdp"
    if size in ("xl", "g"):
        config.optim.mu_dtype = "bfloat16"
    if objective == "ddpm":
        config.diffusion.path = "ddpm"
        config.sampling.update(sampler="ddpm", steps=250, cfg=1.5, cfg_channels=3, joint=True)
    else:
        model.dit.reverse_time = True
        config.diffusion.time_sampling = "logit_normal"
        config.sampling.update(sampler="euler", steps=50, cfg=1.5)
    return config
