"""How JiTMoE was measured: 50,000 samples in pixels, 50 Heun steps, guidance 2.9 for t in (0.1, 1).

    python -m moe_diffusion.evaluate --protocol jitmoe --workdir RUN --inception FILE \
        --reference jit_in256_stats.npz
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import jit_suite
from moe_diffusion.config import parse_arg


def get_protocol(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    protocol = jit_suite(2.9)
    protocol.source = "arXiv 2512.01252; EfficientMoE/JiTMoE/train_jit_*.sh and engine_jit.py"
    protocol.batch_size = 1024  # 128 on each of 8 devices (L: 64 on 16); no influence
    return protocol
