"""How ProMoE was measured: 50,000 samples, 250 Euler steps, guidance 1.0 and 1.5.

    python -m moe_diffusion.evaluate --protocol promoe --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import adm_suite, two_passes
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    protocol = adm_suite()
    protocol.source = "arXiv 2510.24711; ProMoE/sample.py, configs/004_ProMoE_*.yaml, run_eval.py"
    protocol.sampling = {"sampler": "euler", "steps": 250, **two_passes()}
    protocol.matmul = "float32"  # cfg.val_param_dtype; nothing switches TF32 on
    protocol.cfg = (1.0, 1.5)
    protocol.batch_size = 128
    protocol.autoencoder = "sd-vae-ft-mse"
    return protocol
