"""How DiffMoE's flow models were measured: 50,000 samples, 250 Euler steps, without guidance.

    python -m moe_diffusion.evaluate --protocol diffmoe_flow --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

Argument: cfg=1.0 (Table 1 of arXiv 2503.14487) | 1.5 (the default of the released script).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import features_of_decoder
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, cfg=1.0)
    protocol = features_of_decoder()
    protocol.source = "arXiv 2503.14487, Table 1; DiffMoE/sample_ddp_feature.py and its README"
    protocol.sampling = {"sampler": "euler", "steps": 250, "cfg_interval": (0.0, 1.0)}
    protocol.cfg = (arg.cfg,)
    protocol.batch_size = 128  # experts choose among the tokens of a batch: the authors' is 125
    return protocol
