"""How JiT was measured: 50,000 samples in pixels, 50 Heun steps, guidance for t in (0.1, 1).

    python -m moe_diffusion.evaluate --protocol jit:size=l --workdir RUN --inception FILE \
        --reference jit_in256_stats.npz

Argument: size=b | l | h, which fixes the guidance scale: 3.0, 2.4, 2.2 at 256x256.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import jit_suite
from moe_diffusion.config import parse_arg

_SCALES = {"b": 3.0, "l": 2.4, "h": 2.2}


def get_protocol(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"size": tuple(_SCALES)}, size="b")
    protocol = jit_suite(_SCALES[arg.size])
    protocol.source = "arXiv 2511.13720; JiT/README.md (evaluation) and denoiser.py"
    protocol.batch_size = 2048  # 256 on each of 8 devices; no influence on the images
    return protocol
