"""The dense DiT of handwritten digits as a Mixture of Experts (Dense2MoE, arXiv 2510.09094).

    python -m moe_diffusion.train --config configs/digits.py:router=dense --workdir runs/digits
    python -m moe_diffusion.distill --config configs/digits_moe.py --workdir runs/digits_moe \\
      --config.distill.teacher=runs/digits
    python -m moe_diffusion.train --config configs/digits_moe.py --workdir runs/digits_scratch

The last command trains the same model from scratch, for as many steps as the stages have.

Arguments: size=tiny | small (that of the teacher), skip_first=0 (blocks that stay dense),
adaln_rank=0 (width of the compressed modulation, 0 leaves it whole), groups=none or like 3-5
(Mixture of Blocks), active=1 (blocks of a group that a sample passes).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import dense2moe
from configs.families.digits import digits


def get_config(arg: str | None = None) -> ConfigDict:
    arg = dense2moe.parse(arg, size="tiny", choices={"size": ("tiny", "small")})
    config = digits("dense", arg.size)
    config.name = f"digits_moe_{arg.size}"
    dense2moe.experts(config, arg, steps=400, learning_rate=1e-3)
    config.optim.warmup_steps = 20  # of each stage
    config.distill.importance_batches = 20
    return config
