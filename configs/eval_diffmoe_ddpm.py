"""How DiffMoE's DDPM models were measured: 50,000 samples, 250 ancestral steps, without guidance.

    python -m moe_diffusion.evaluate --protocol diffmoe_ddpm --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

Argument: cfg=1.0 (arXiv 2503.14487) | 1.5 (the default of the released script; guides 3 channels).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import features_of_decoder
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, cfg=1.0)
    protocol = features_of_decoder()
    protocol.source = "arXiv 2503.14487; DiffMoE/sample_ddp_feature.py and its README"
    protocol.sampling = {"sampler": "ddpm", "steps": 250, "cfg_channels": 3}
    protocol.cfg = (arg.cfg,)
    protocol.batch_size = 128  # experts choose among the tokens of a batch: the authors' is 125
    return protocol
