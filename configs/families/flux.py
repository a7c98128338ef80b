"""FLUX.1 [dev] and [schnell] (github.com/black-forest-labs/flux), and a tiny one for tests."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dense2moe import give_experts
from configs.families.digits import train_briefly
from moe_diffusion import config as configs
from moe_diffusion.interop.flux import configure

# The fields of FluxParams, flux/util.py.
PARAMS = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": (16, 56, 56),
}
TINY = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 16,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": (8, 12, 12),
}
DIGITS = {
    "in_channels": 4,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 64,
    "num_heads": 4,
    "depth": 4,
    "depth_single_blocks": 10,
    "axes_dim": (4, 6, 6),
}


def flux(name: str, guidance: bool, pixels: int = 1024) -> ConfigDict:
    """A published FLUX.1 transformer, with the authors' sampler.

    Args:
      guidance: whether it takes a guidance scale: [dev] does, [schnell] does not.
      pixels: side of the images, a multiple of 16.
    """
    config = configs.default()
    config.name = name
    configure({**PARAMS, "guidance_embed": guidance}, config)
    config.model.image_size = pixels // 8
    config.model.dtype, config.model.remat = "auto", "full"
    # How FLUX.1 was trained is not published. These are the times of SD3 (2403.03206).
    config.diffusion.time_sampling = "logit_normal"
    config.data.source = "latents:data/captioned_latents"
    config.data.batch_size = 64
    config.parallel.preset = "fsdp"
    return config


def tiny() -> ConfigDict:
    """Both kinds of blocks, a guidance scale and prompts of eight tokens; made-up data."""
    config = configs.default()
    config.name = "flux_tiny"
    configure({**TINY, "guidance_embed": True}, config)
    config.model.image_size = 8
    config.model.flux.update(text_tokens=8, text_dtype="float32")
    config.data.source = "synthetic"
    config.data.batch_size = 32
    config.train.num_steps = 200
    config.sampling.steps = 8
    return config


def digits_moe() -> ConfigDict:
    """`digits` with experts at the ratios of FLUX.1-MoE, to be distilled.

    Of the four double blocks the first stays dense, as the first three of FLUX.1 do.
    """
    config = staged(digits())
    give_experts(config.model, skip_first=1)
    config.model.adaln_rank, config.distill.adaln_stage = 16, "both"
    return config


def staged(config: ConfigDict) -> ConfigDict:
    """`digits`, or something made of it, with the training of the stages of `distill`."""
    config.data.batch_size = 64
    config.optim.warmup_steps = 20
    config.ema.decays = (0.99,)
    config.train.sample_every, config.train.eval_samples = 0, 0
    config.distill.teacher = "runs/digits_flux"
    config.distill.importance_batches = 20
    for stage in ("shared", "experts", "groups"):
        config.distill[stage].update(steps=400, learning_rate=3e-3)
    return config


def digits() -> ConfigDict:
    """A narrow one with a text encoder of its own, on 8x8 digits with prompts."""
    config = configs.default()
    config.name = "digits_flux"
    configure({**DIGITS, "guidance_embed": False}, config)
    config.model.image_size = 8
    config.model.flux.update(text_tokens=12, text_dtype="float32", vocabulary="digits")
    config.data.source = "digits_prompts"
    config.diffusion.cond_dropout = 0.1
    train_briefly(config, num_steps=2000)
    config.sampling.cfg = 2.0
    return config
