"""How DSMoE was measured: 50,000 samples, 250 Euler steps, guidance 1.0 and 1.5 (Tables 2, 3, 5).

    python -m moe_diffusion.evaluate --protocol dsmoe --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import features_of_decoder, two_passes
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    protocol = features_of_decoder()
    protocol.source = "arXiv 2512.01252; EfficientMoE/DSMoE/sample_ddp_feature.py"
    protocol.sampling = {"sampler": "euler", "steps": 250, **two_passes()}
    # Its Table 2 measures DiffMoE, too: the script's images on one device compete for experts.
    protocol.sampling.pool = 32
    protocol.model.router = {"max_capacity": 0.0}
    protocol.cfg = (1.0, 1.5)
    protocol.batch_size = 256  # 32 on each of 8 devices; no influence on the images
    return protocol
