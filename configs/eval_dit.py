"""How DiT was measured: 50,000 samples, 250 DDPM steps, guidance 1.0 and 1.5.

    python -m moe_diffusion.evaluate --protocol dit --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

The published XL/2 used the ft-ema decoder; the README's table of retrained models ft-mse.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import adm_suite, forward_with_cfg
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    protocol = adm_suite()
    protocol.source = "arXiv 2212.09748; DiT/sample_ddp.py and README.md"
    protocol.sampling = {"sampler": "ddpm", "steps": 250, **forward_with_cfg()}
    protocol.cfg = (1.0, 1.5)
    protocol.batch_size = 256  # 32 on each of 8 devices; no influence on the images
    protocol.autoencoder = "sd-vae-ft-ema"
    return protocol
