"""The tiny FLUX.1 of digits_flux.py, pruned to the activated parameters of digits_flux_moe.py.

    python -m moe_diffusion.distill --config configs/digits_flux_pruned.py:how=depth \
      --workdir runs/digits_depth --config.distill.teacher=runs/digits_flux

The baselines of Tables 2 and 3 of 2510.09094. how=mlp keeps the most important hidden units of each
MLP (Diff-Pruning's Taylor scores). how=depth keeps the blocks that change their input most, as
FLUX.1-Lite does, and trains all weights, as BK-SDM does. match=l or m says whose activated
parameters it has, within 2.5%, never fewer than half a percent below. It trains for as many steps
as all stages of that student together.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.flux import digits, digits_moe, staged
from moe_diffusion.config import parse_arg

HIDDEN = {"l": 104, "m": 32}  # units of an MLP; a teacher's has 256
DEPTH = {"l": (3, 4), "m": (2, 4)}  # double and single blocks; a teacher has 4 and 10
STAGES = {"l": 2, "m": 3}


def get_config(arg: str | None = None) -> ConfigDict:
    chosen = parse_arg(
        arg, how="mlp", match="l", choices={"how": ("mlp", "depth"), "match": ("l", "m")}
    )
    how, match = chosen.how, chosen.match
    if how == "mlp":
        config = digits_moe()
        config.model.moe.update(num_experts=0, shared_hidden_size=HIDDEN[match])
        config.model.router.top_k = 0
    else:
        config = staged(digits())
        config.model.depth, config.model.flux.single_depth = DEPTH[match]
        config.distill.blocks, config.distill.shared.trainable = ("lite",), ("*",)
    config.name = f"digits_flux_{how}_{match}"
    config.distill.shared.steps *= STAGES[match]
    config.distill.experts.steps = config.distill.groups.steps = 0
    return config
