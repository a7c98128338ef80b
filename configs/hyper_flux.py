"""Hyper-FLUX: FLUX.1 [dev] with the LoRA of ByteDance/Hyper-SD for eight steps, merged at 0.125.

    python -m moe_diffusion.convert --family flux --config hyper_flux \\
      --input flux1-dev.safetensors --lora Hyper-FLUX.1-dev-8steps-lora.safetensors \\
      --lora-scale 0.125 --output runs/hyper_flux
    python -m moe_diffusion.sample --workdir runs/hyper_flux --text-encoders FLUX.1-dev/ \\
      --vae ae.safetensors --prompt "a red fox in the snow" --guidance 3.5

Argument: pixels=1024, the side of the images, a multiple of 16.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import flux
from moe_diffusion.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = flux("hyper_flux", True, parse_arg(arg, pixels=1024).pixels)
    config.sampling.steps = 8  # of Euler's method, each with one evaluation of the network
    return config
