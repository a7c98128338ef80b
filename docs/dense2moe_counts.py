"""Dense2MoE's Table 1 (2510.09094) beside our counts: parameters that a token uses, and FLOPs."""

from __future__ import annotations

import math
import re

from flax.traverse_util import flatten_dict

from docs.measure import measure
from moe_diffusion import config as configs
from moe_diffusion.models import build
from moe_diffusion.models.flux import Flux
from moe_diffusion.models.stack import abstract_variables

# config -> name, activated parameters in 10^9 and FLOPs in 10^12 of the paper's Table 1.
TABLE_1 = {
    "configs/flux_dev.py": ("FLUX.1 [dev]", 11.90, 66.00),
    "configs/flux_lite.py": ("FLUX.1-Lite", 8.16, 53.15),
    "configs/flux_moe_l.py": ("FLUX.1-MoE-L", 5.15, 43.42),
    "configs/flux_moe_m.py": ("FLUX.1-MoE-M", 4.01, 35.70),
    "configs/flux_mini.py": ("FLUX-Mini", 3.18, 17.37),
    "configs/flux_moe_s.py": ("FLUX.1-MoE-S", 3.19, 26.43),
    "configs/flux_moe_xs.py": ("FLUX.1-MoE-XS", 2.64, 20.26),
}
COLUMNS = (
    "model",
    "total, 10^9",
    "activated, 10^9",
    "without the text's experts",
    "and with a condition of 256 channels",
    "paper",
    "FLOPs an image, 10^12",
    "times 66.00 / 74.38",
    "paper",
)


def left_out(model: Flux) -> tuple[float, float]:
    """Activated parameters that the paper's counts seem to lack, of a model with experts.

    Returns:
      Those of the experts of the text's stream in double blocks; and those that a condition y of
      `adaln_rank` channels would not have. Then the last layers of the embedders of time, guidance
      and pooled text end in so many channels, the final layer's modulation begins with them, and no
      block has to compress y.
    """
    rank, width, routers = model.adaln_rank, model.hidden_size, model.routers()
    shares: dict[str, float] = {}  # path of stacked blocks -> how many of them a sample passes
    for block in model.blocks():
        shares[block.path] = shares.get(block.path, 0) + block.share
    text = condition = 0.0
    for path, leaf in flatten_dict(abstract_variables(model)["params"], sep="/").items():
        place = next((p for p in shares if path.startswith(f"{p}/")), "")
        used = shares.get(place, 1) * math.prod(leaf.shape[model.is_stacked(path) :])
        layer = path.removeprefix(f"{place}/")
        if layer.startswith("text_moe/experts/"):
            router = routers[f"{place}/text_moe/router"]
            text += used * router.experts_per_token / router.num_experts
        elif layer.startswith("text_moe/"):
            text += used
        elif rank and re.fullmatch(r"\w*adaLN/down/kernel", layer):
            condition += used
        elif rank and re.match(r"(time|pooled|guidance)_embed/dense_1/|final/adaLN/kernel", path):
            condition += used * (width - rank) / width
    return text, condition


def activated(spec: str) -> tuple[float, float, float]:
    """Activated parameters; without the first of `left_out`; and without both of them."""
    model, ours = build(configs.load(spec).model), measure(spec).counts["total"].activated
    text, condition = left_out(model) if model.make_moe else (0, 0)
    return ours, ours - text, ours - text - condition


def table() -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * 8]
    for spec, (name, paper, paper_flops) in TABLE_1.items():
        entry = measure(spec)
        counts = [f"{n / 1e9:.3f}" for n in (entry.counts["total"].total, *activated(spec))]
        flops = [f"{n:.2f}" for n in (paper, entry.flops / 1e12, scaled(spec), paper_flops)]
        lines.append("| " + " | ".join([name, *counts, *flops]) + " |")
    return "\n".join(lines)


def scaled(spec: str) -> float:
    """FLOPs in 10^12, by a factor that makes FLUX.1 [dev] the paper's 66.00."""
    dense = "configs/flux_dev.py"
    return TABLE_1[dense][2] * measure(spec).flops / measure(dense).flops
