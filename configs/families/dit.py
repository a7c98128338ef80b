"""The dense transformers, DiT and SiT, and what the latent models with their geometry share."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import settings
from moe_diffusion import config as configs

# size -> depth, width, heads. S to XL: arXiv 2212.09748, table 1. Of its two larger dense models,
# DiffMoE (arXiv 2503.14487, table 5) gives only the number of parameters, 951M and 1353M. Depth and
# width 32 x 1280 and 36 x 1440 with 16 heads have as many and continue the row.
SIZES = {
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
    "xxl": (32, 1280, 16),
    "xxxl": (36, 1440, 16),
}
OBJECTIVES = ("ddpm", "flow")


def imagenet_latents(name: str, size: str, objective: str) -> ConfigDict:
    """A DiT without experts on ImageNet 256x256 latents: geometry, objective, optimiser, sampler.

    Args:
      size: of SIZES.
      objective: "ddpm", sampled in 250 steps with three guided channels, as in DiT; or "flow",
        sampled in 250 Euler steps, as in DiffMoE.
    """
    config = configs.default()
    config.name = f"{name}_{objective}"

    model = config.model
    model.depth, model.hidden_size, model.num_heads = SIZES[size]
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.num_classes = 1000
    model.learn_sigma = True  # the published flow models have it, too; their loss uses one half
    model.dtype = "auto"
    model.router.name = "dense"

    # AdamW(0.9, 0.999), constant 1e-4, no decay, no clipping, EMA 0.9999, label dropout 0.1 and
    # uniform times are the defaults.
    config.data.source = "latents:data/imagenet256_latents"
    config.data.augment = "flip"
    config.checkpoint.keep_every = 50_000
    config.parallel.preset = "dp" if size in ("s", "b") else "fsdp"

    sampling = config.sampling
    sampling.steps, sampling.cfg = 250, 1.5
    if objective == "ddpm":
        config.diffusion.path = "ddpm"
        sampling.sampler, sampling.cfg_channels, sampling.joint = "ddpm", 3, True
    else:
        sampling.sampler = "euler"
    return config


def dit(size: str, arg: str | None, objective: str = "ddpm") -> ConfigDict:
    """Dense DiT (arXiv 2212.09748), or DiffMoE's baseline Dense-DiT-Flow.

    Args:
      size: of SIZES.
      arg: of the config file: objective=ddpm | flow, setting= one of `settings.SETTINGS`.
      objective: the default.
    """
    choices = {"objective": OBJECTIVES}
    chosen = settings.parse(f"dit_{size}", arg, choices=choices, objective=objective)
    config = _dense(f"dit_{size}", size, chosen.objective)
    settings.apply(config, chosen.setting)
    return config


def _dense(name: str, size: str, objective: str) -> ConfigDict:
    config = imagenet_latents(name, size, objective)
    config.data.batch_size = 256
    config.train.num_steps = 7_000_000
    return config


def sit(size: str) -> ConfigDict:
    """SiT (arXiv 2401.08740): DiT as a flow, sampled by the SDE with w(t) = 1 - t."""
    config = _dense(f"sit_{size}", size, "flow")
    config.name = f"sit_{size}"
    # The SDE gives SiT's best published FID, 2.06. The ODE (--sampler dopri5) gives 2.15.
    config.sampling.sampler = "sde"
    config.sampling.cfg_channels, config.sampling.joint = 3, True
    return config
