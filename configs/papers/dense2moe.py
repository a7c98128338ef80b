"""Tables and figures of Dense2MoE (arXiv 2510.09094)."""

from __future__ import annotations

from moe_diffusion.reproduction.items import Item, Row

PAPER = "Dense2MoE (arXiv 2510.09094)"

# label -> config, activated parameters in 10^6 and FLOPs in 10^12 (Table 1).
_TABLE_1 = {
    "FLUX.1 [dev]": ("configs/flux_dev.py", 11900, 66.00),
    "HyperFLUX": ("configs/hyper_flux.py", 11900, 66.00),
    "FLUX.1-Lite": ("configs/flux_lite.py", 8160, 53.15),
    "FLUX.1-MoE-L": ("configs/flux_moe_l.py", 5150, 43.42),
    "HyperFLUX-MoE-L": ("configs/hyper_flux_moe_l.py", 5150, 43.42),
    "FLUX.1-MoE-M": ("configs/flux_moe_m.py", 4010, 35.70),
    "FLUX-Mini": ("configs/flux_mini.py", 3180, 17.37),
    "FLUX.1-MoE-S": ("configs/flux_moe_s.py", 3190, 26.43),
    "FLUX.1-MoE-XS": ("configs/flux_moe_xs.py", 2640, 20.26),
    "HyperFLUX-MoE-XS": ("configs/hyper_flux_moe_xs.py", 2640, 20.26),
}
_ROWS = tuple(
    Row(label, config, published={"activated": activated, "tflops": tflops})
    for label, (config, activated, tflops) in _TABLE_1.items()
)

_WEIGHTS = "trained weights: the authors published none, and ours need FLUX.1's and a distillation"


def _missing(name: str, title: str, how: str) -> Item:
    return Item(f"dense2moe_{name}", title, missing=f"{_WEIGHTS}; then {how}")


_SCORERS = "the images of `sample`, and the scorers of others (CLIP score, ImageReward, MPS, {})"
_TABLE_1_SCORERS = _SCORERS.format("GenEval, DPG-Bench, T2I-CompBench")
_TABLE_2_SCORERS = _SCORERS.format("GenEval, DPG-Bench")
_TABLE_4_SCORERS = _SCORERS.format("GenEval")
_ABLATION = "train `flux_moe_ablation:variant=...` for every row, draw "

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
ITEMS = [
    _missing("figure1", "Figure 1: images of FLUX.1 [dev] and its students", "`sample`"),
    Item(
        "dense2moe_figure2",
        "Figure 2, left: activated parameters by kind of module",
        tuple(row for row in _ROWS if not row.label.startswith("Hyper")),
        counts="10^6",
        bars=True,
        note="The bars are ours; docs/models.md says what the paper leaves out. Its right half has "
        "the GenEval scores of Table 1.",
    ),
    MADE["figure3"],
    Item(
        "dense2moe_table1",
        "Table 1, cost: activated parameters, FLOPs",
        _ROWS,
        counts="10^6",
        note="FLOPs are those of one step. docs/models.md says what the paper leaves out of the "
        "parameters, and what is known of its FLOPs.",
    ),
    _missing("table1_quality", "Table 1, quality", _TABLE_1_SCORERS),
    _missing("table2", "Table 2: pruned MLPs and MoE", _ABLATION + _TABLE_2_SCORERS),
    _missing("table3", "Table 3: fewer blocks and Mixture of Blocks", _ABLATION + _TABLE_2_SCORERS),
    _missing("table4", "Table 4: numbers and widths of experts", _ABLATION + _TABLE_4_SCORERS),
    _missing("table5", "Table 5: initialisation and distillation", _ABLATION + _TABLE_4_SCORERS),
    _missing(
        "figure5",
        "Figure 5: sizes of Mixture-of-Blocks groups",
        "the losses of `flux_moe_ablation:variant=groups4x3`, `groups2x6` and `groups1x12`, which "
        "`python -m moe_diffusion.curves` draws",
    ),
    MADE["figure6"],
    MADE["figure7"],
    MADE["figure8"],
]
