"""The published JiT (arXiv 2511.13720) and JiTMoE (arXiv 2512.01252): pixels of ImageNet."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import settings
from configs.families.settings import STEPS_PER_EPOCH
from moe_diffusion import config as configs
from moe_diffusion.interop.jit import configure

# size -> guidance scale of the authors' example command. The authors search it between 1 and 4 for
# every model. They publish none for L and G, which have that of the nearest size here.
_CFG = {"B": 2.9, "L": 2.9, "H": 2.2, "G": 2.2}


def jit(size: str, patch_size: int, arg: str | None, experts: int = 0) -> ConfigDict:
    """JiT for ImageNet at 256 (patches of 16) or 512 pixels (patches of 32).

    Args:
      size: "B" | "L" | "H" | "G" (2511.13720, Table 9; numbers in interop/jit.py).
      arg: of the config file: setting=dsmoe_table4, where B and L with patches of 16 have a place.
      experts: 16 = JiTMoE (2512.01252), which exists in B, L and H with patches of 16; 0 = dense.
    """
    config = configs.default()
    family = "jitmoe" if experts else "jit"
    config.name = f"{family}_{size.lower()}{patch_size}"
    chosen = settings.parse(config.name, arg)
    args = {
        "model": f"JiT-{size}/{patch_size}" + (f"-E{experts}" if experts else ""),
        "img_size": 16 * patch_size,
        # JiT-H and G have dropout (Table 9), the commands of JiTMoE do not.
        "proj_dropout": 0.2 if size in "HG" and not experts else 0.0,
        # Twice the side needs twice the noise for about the same signal-to-noise ratio (app. A).
        "noise_scale": patch_size / 16,
        "cfg": _CFG[size],
        "interval_min": 0.1,
        "interval_max": 1.0,
    }
    configure(family, args, config)
    config.model.dtype = "auto"

    # Table 9 and main_jit.py: Adam(0.9, 0.95), 2e-4 (5e-5 x 1024 / 256) after 5 epochs, constant.
    config.optim.learning_rate, config.optim.b2 = 2e-4, 0.95
    config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
    config.optim.decay_mask = "matrices"
    config.ema.decays, config.ema.router_state = (0.9999, 0.9996), "live"
    config.data.source = "folder:data/imagenet/train"
    config.data.augment = "flip"
    config.data.batch_size = 1024
    # JiTMoE's published figures are those of 200 epochs (its commands say 600, at the same rate).
    config.train.num_steps = (200 if experts else 600) * STEPS_PER_EPOCH
    config.checkpoint.keep_every = 100 * STEPS_PER_EPOCH
    config.parallel.preset = "dp" if size == "B" else "fsdp"
    settings.apply(config, chosen.setting)
    return config
