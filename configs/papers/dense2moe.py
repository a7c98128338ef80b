"""Tables and figures of Dense2MoE (arXiv 2510.09094)."""

from __future__ import annotations

from moe_diffusion.reproduction.items import Item

PAPER = "Dense2MoE (arXiv 2510.09094)"

_MISSING = "FLUX.1 and its distillation into a MoE are not in the library yet"

_L = "configs/flux_moe_l.py"
_PROMPTS = "The paper's prompts are 1,000 of MJHQ-30K in ten categories: --prompts FILE.jsonl."

MADE = {
    "figure3": Item(
        "dense2moe_figure3",
        "Figure 3: mean squared error between input and output of each block",
        commands=("routing --workdir {run} --num 1000 {prompts} --out {out}",),
        model="configs/flux_dev.py",
        note=f"blocks.png; the paper shows the single blocks alone. {_PROMPTS}",
    ),
    "figure6": Item(
        "dense2moe_figure6",
        "Figure 6: which experts are chosen",
        commands=(
            'routing --workdir {run} --num 1000 {prompts} --blocks "4 image,23" --out {out}',
        ),
        model=_L,
        note=f"selection.png; the fifth double block and the fifth single block. {_PROMPTS}",
    ),
    "figure7": Item(
        "dense2moe_figure7",
        "Figure 7: experts of the tokens of one image",
        commands=("routing --workdir {run} --num 1 {prompts} --out {out}",),
        model=_L,
        note="tokens.png.",
    ),
    "figure8": Item(
        "dense2moe_figure8",
        "Figure 8: other top-k",
        commands=(
            "sample --workdir {run} --num 8 {prompts} --top-k 0,1,2,4 --out {out}/top_k.png",
        ),
        model=_L,
        note="sample --teacher FOLDER draws the column of the original model, too.",
    ),
}
_CURVES = "distill trains the groupings, and python -m moe_diffusion.curves draws their losses"
_LACKS = {"figure5": _CURVES}

ITEMS = [
    MADE.get(name) or Item(f"dense2moe_{name}", title, missing=_LACKS.get(name, _MISSING))
    for name, title in (
        ("figure1", "Figure 1: FLUX.1 [dev] and the FLUX.1-MoE models, images"),
        ("figure2", "Figure 2: activated parameters by kind of module"),
        ("figure3", "Figure 3: mean squared error between input and output of each block"),
        ("table1", "Table 1: quality and cost against other compressed models"),
        ("table2", "Table 2: pruned MLPs and MoE"),
        ("table3", "Table 3: fewer blocks and Mixture of Blocks"),
        ("table4", "Table 4: numbers and widths of experts"),
        ("table5", "Table 5: initialisation and distillation"),
        ("figure5", "Figure 5: sizes of Mixture-of-Blocks groups"),
        ("figure6", "Figure 6: which experts are chosen"),
        ("figure7", "Figure 7: experts of the tokens of one image"),
        ("figure8", "Figure 8: other top-k"),
    )
]
